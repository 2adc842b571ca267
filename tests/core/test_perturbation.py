"""epsilon computed by hand: 3-4-5 triangles, masks, and the four norms."""

import re

import numpy as np
import pytest

from esam_core import ESAMValueError
from esam_core.perturbation import NORMS, perturbation_norm, perturbations, squared_norms

# ||g|| is 5 over the first unit, 12 over the second, 13 over both.
G = [np.array([3.0, 4.0]), np.array([[12.0]])]
THETA = [np.array([1.0, -2.0]), np.array([[0.5]])]


def epsilon(g, scale, *, rho=1.0, norm="masked", norm_eps=1e-12, adaptive=False):
    """Return perturbations with the same rho and adaptive for all units."""
    return perturbations(
        g,
        THETA,
        scale,
        rho=[rho] * 2,
        norm=norm,
        norm_eps=norm_eps,
        adaptive=[adaptive] * 2,
    )


def length(arrays):
    """Return the common norm of some arrays."""
    return np.sqrt(sum(np.sum(a * a) for a in arrays))


def test_sam():
    first, second = epsilon(G, [1.0, 1.0], rho=0.26)
    assert first == pytest.approx(np.array([0.06, 0.08]))
    assert second == pytest.approx(np.array([[0.24]]))
    assert length((first, second)) == pytest.approx(0.26)


def test_masked_norm_of_one_unit_of_two():
    """p = .5: the norm is that of this unit alone, and the radius is rho / p."""
    first, second = epsilon([G[0], None], [2.0, 0.0], rho=0.5)
    assert first == pytest.approx(np.array([0.6, 0.8]))
    assert second.tolist() == [[0.0]]


def test_full_norm_of_one_unit_of_two():
    first, second = epsilon(G, [2.0, 0.0], rho=0.5, norm="full")
    assert first == pytest.approx(np.array([3.0, 4.0]) / 13)
    assert second.tolist() == [[0.0]]


def test_estimated_norm_by_hand():
    # ||g||^2 is estimated as 25 / .5 = 50.
    assert perturbation_norm(
        [G[0], None], THETA, [2.0, 0.0], norm="estimated", adaptive=[False, False]
    ) == pytest.approx(np.sqrt(50))


def test_estimated_norm_is_unbiased_for_the_square():
    p, both = 0.5, [False, False]
    masks = [(a, b) for a in (0.0, 1.0) for b in (0.0, 1.0)]
    squares = [
        perturbation_norm(G, THETA, [a / p, b / p], norm="estimated", adaptive=both) ** 2
        for a, b in masks
    ]
    assert np.mean(squares) == pytest.approx(13**2)  # the four masks are equally likely


@pytest.mark.parametrize("beta", [0.25, 0.6])
@pytest.mark.parametrize(("norm", "power"), [("masked", 1), ("estimated", 0.5), ("full", 0.5)])
def test_lengths_with_random_masks(norm, power, beta):
    """rho / p, rho / sqrt(p), and the latter only in the root mean square, as the docs say."""
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=size) for size in rng.integers(3, 30, 20)]
    lengths = []
    for _ in range(1000):
        scale = np.where(rng.random(20) < beta, 1 / beta, 0.0)
        if not scale.any():
            continue  # an empty mask is a base step
        found = perturbations(
            [g if s or norm == "full" else None for g, s in zip(gradients, scale, strict=True)],
            [np.zeros_like(g) for g in gradients],
            scale,
            rho=[0.5] * 20,
            norm=norm,
            adaptive=[False] * 20,
        )
        lengths.append(length(found))
    assert np.sqrt(np.mean(np.square(lengths))) == pytest.approx(0.5 / beta**power, rel=0.02)
    assert (np.ptp(lengths) < 1e-9) == (norm != "full")


def test_no_norm_is_algorithm_one_as_printed():
    first, second = epsilon(G, [2.0, 2.0], rho=0.1, norm="none", norm_eps=100.0)
    assert first == pytest.approx(0.2 * G[0])
    assert second == pytest.approx(0.2 * G[1])


def test_adaptive_by_hand():
    # |theta| g = (3, 8) and 6: norm sqrt(109). theta^2 g = (3, 16) and 3.
    first, second = epsilon(G, [1.0, 1.0], rho=1.0, adaptive=True)
    assert first == pytest.approx(np.array([3.0, 16.0]) / np.sqrt(109))
    assert second == pytest.approx(np.array([[3.0]]) / np.sqrt(109))
    scaled = [e / np.abs(theta) for e, theta in zip((first, second), THETA, strict=True)]
    assert length(scaled) == pytest.approx(1.0)  # ASAM's constraint: ||epsilon/|theta||| = rho


def test_one_norm_over_adaptive_and_other_units():
    first, second = perturbations(G, THETA, [1.0, 1.0], rho=[1.0, 1.0], adaptive=[True, False])
    common = np.sqrt(3**2 + 8**2 + 12**2)
    assert first == pytest.approx(np.array([3.0, 16.0]) / common)
    assert second == pytest.approx(np.array([[12.0]]) / common)


def test_different_radii_share_one_norm():
    first, second = perturbations(G, THETA, [1.0, 1.0], rho=[0.13, 1.3], adaptive=[False] * 2)
    assert first == pytest.approx(0.01 * G[0])
    assert second == pytest.approx(0.1 * G[1])


def test_masks_of_single_weights():
    scale = [np.array([2.0, 0.0]), np.array([[2.0]])]
    first, second = epsilon(G, scale, rho=1.0)
    common = np.sqrt(3**2 + 12**2)  # of the masked weights alone
    assert first == pytest.approx(np.array([6.0, 0.0]) / common)
    assert second == pytest.approx(np.array([[24.0]]) / common)
    assert length((first, second)) == pytest.approx(2.0)


def test_norm_eps_is_added_to_the_norm():
    (first, _) = epsilon(G, [1.0, 1.0], norm_eps=13.0)
    assert first == pytest.approx(G[0] / 26)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("norm_eps", [1e-12, 1e-50, 1e-320])
@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_gives_zero(norm, norm_eps, dtype):
    """1e-50 is 0 in float32: 0 / 0 would be NaN."""
    zero = [np.zeros_like(g, dtype=dtype) for g in G]
    for found in epsilon(zero, [1.0, 1.0], norm=norm, norm_eps=norm_eps):
        assert found.dtype == dtype
        assert np.all(found == 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_not_finite_gives_zero(bad, norm):
    g = [np.array([1.0, bad]), G[1]]
    assert all(not e.any() for e in epsilon(g, [1.0, 1.0], norm=norm))


def test_a_norm_that_overflows_gives_zero():
    g = [np.array([1e200, 1e200]), G[1]]
    with np.errstate(over="ignore"):
        assert all(not e.any() for e in epsilon(g, [1.0, 1.0]))


def test_float32_is_kept_and_its_squares_do_not_underflow():
    g = [np.array([3e-30, 4e-30], np.float32)]
    theta = [np.zeros(2, np.float32)]
    (found,) = perturbations(g, theta, [1.0], rho=[1.0], norm_eps=1e-40, adaptive=[False])
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array([0.6, 0.8]))


def test_squared_norms():
    assert squared_norms([G[0], None], THETA, [False, False]) == [25.0, 0.0]
    assert squared_norms(G, THETA, [True, True]) == [73.0, 36.0]


def test_unknown_norm():
    with pytest.raises(ESAMValueError, match=re.escape("`norm` must be one of")):
        perturbation_norm(G, THETA, [1.0, 1.0], norm="l1", adaptive=[False] * 2)


def test_arguments_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="argument"):
        perturbations(G, THETA, [1.0], rho=[1.0, 1.0], adaptive=[False, False])


@pytest.mark.parametrize("norm", NORMS)
def test_adaptive_perturbations_of_complex_weights(norm):
    """Rotating weight and gradient by the same angle rotates epsilon by this angle."""
    theta, g = np.array([3.0, -0.5]), np.array([1.0, 2.0])
    (real,) = perturbations([g], [theta], [1.0], rho=[0.5], norm=norm, adaptive=[True])
    turn = np.exp(1j * np.array([0.3, 2.0]))
    (found,) = perturbations(
        [turn * g], [turn * theta], [1.0], rho=[0.5], norm=norm, adaptive=[True]
    )
    np.testing.assert_allclose(found, turn * real, rtol=1e-14)
    assert np.vdot(turn * g, found).real > 0.0
