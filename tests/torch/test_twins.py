"""Fast implementations compared with the reference in esam-core, on random and difficult inputs."""

import numpy as np
import pytest
import torch

import esam_torch.selection
from esam_core import Proportional, Random, TopIncrease, TopLoss, selectors
from esam_core.perturbation import NORMS, perturbation_norm, perturbations
from esam_torch.perturbation import perturb
from esam_torch.selection import (
    inclusion_probabilities,
    select,
    systematic_indices,
    top_indices,
)
from esam_torch.targets import Targets

# -- selection ---------------------------------------------------------------------------------


def scores_of(kind, b, rng):
    """Return b scores of a difficult kind."""
    drawn = rng.standard_normal(b)
    return {
        "random": drawn,
        "tied": np.round(drawn),
        "equal": np.full(b, 0.25),
        "zero": np.zeros(b),
        "signed zero": np.where(drawn > 0, 0.0, -0.0),
        "negative": -np.abs(drawn),
        "heavy tail": np.exp(4.0 * drawn),
        "one holds all": np.where(np.arange(b) == b // 2, 5.0, 0.0),
        "nan": np.where(np.arange(b) == b - 1, np.nan, drawn),
        "nan and inf": np.where(np.arange(b) % 3 == 0, np.where(drawn > 0, np.inf, np.nan), drawn),
    }[kind]


KINDS = (
    *("random", "tied", "equal", "zero", "signed zero", "negative", "heavy tail"),
    *("one holds all", "nan", "nan and inf"),
)
FINITE = KINDS[:-2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_top_indices(kind, dtype):
    rng = np.random.default_rng(0)
    for b in (1, 2, 3, 8, 17, 64):
        for k in range(1, b + 1):
            scores = scores_of(kind, b, rng).astype(dtype)
            found = top_indices(torch.from_numpy(scores), k)
            assert found.tolist() == selectors.top_indices(scores, k).tolist()


#: Whether sums are those of integers, as on CUDA if torch must be deterministic.
integers = pytest.mark.parametrize("integers", [False, True])


@integers
@pytest.mark.parametrize("kind", KINDS)
def test_inclusion_probabilities(kind, integers, monkeypatch):
    monkeypatch.setattr(esam_torch.selection, "adds_in_integers", lambda _: integers)
    rng = np.random.default_rng(1)
    for b in (1, 2, 3, 8, 17, 64):
        for k in sorted({1, (b + 1) // 2, b - 1 or 1, b}):
            for floor in (1e-3, 0.5, 1.0):
                scores = scores_of(kind, b, rng).astype(np.float32)
                found = inclusion_probabilities(torch.from_numpy(scores), k, floor).numpy()
                wanted = selectors.inclusion_probabilities(scores, k, floor)
                np.testing.assert_allclose(found, wanted, rtol=1e-9)
                assert found.max() <= 1.0 + 1e-12
                np.testing.assert_allclose(found.sum(), k, rtol=1e-12)


@integers
def test_systematic_indices(integers, monkeypatch):
    monkeypatch.setattr(esam_torch.selection, "adds_in_integers", lambda _: integers)
    rng = np.random.default_rng(2)
    for _ in range(300):
        b = int(rng.integers(1, 40))
        k = int(rng.integers(1, b + 1))
        pi = selectors.inclusion_probabilities(rng.exponential(size=b), k, 0.1)
        offset = float(rng.random())
        found = systematic_indices(torch.from_numpy(pi), k, offset).tolist()
        assert found == selectors.systematic_indices(pi, offset).tolist()
        assert len(set(found)) == k


SELECTORS = (
    TopIncrease(0.5),
    TopIncrease(0.29),
    TopLoss(0.3),
    Random(0.6),
    Proportional(0.5),
    Proportional(0.25, score="increase", floor=0.1),
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_select(selector, dtype):
    rng = np.random.default_rng(3)
    for count, kind in enumerate(FINITE * 4):
        b = int(rng.integers(2, 50))
        if selectors.subset_size(selector.gamma, b) == b:
            continue
        losses = np.abs(scores_of(kind, b, rng)).astype(dtype)
        after = (losses + scores_of(kind, b, rng)).astype(dtype)
        wanted = selectors.select(selector, losses, after, seed=5, count=count)
        needed = torch.from_numpy(after) if selector.score == "increase" else None
        found = select(selector, b, torch.from_numpy(losses), needed, seed=5, count=count)
        assert found.indices.tolist() == wanted.indices.tolist()
        assert found.indices.dtype == torch.int64
        assert found.weights.dtype == torch.from_numpy(losses).dtype
        np.testing.assert_allclose(
            found.weights.numpy(), wanted.weights, rtol=16 * np.finfo(dtype).eps
        )


def targets_of(parameters, scales, rho, adaptive, idle=(), idle_adaptive=()):
    """Return the targets that a step derives from its mask."""
    return Targets(
        tensors=parameters,
        names=tuple(map(str, range(len(parameters)))),
        scales=[float(s) for s in scales],
        factors=[float(s * r) for s, r in zip(scales, rho, strict=True)],
        adaptive=[bool(a) for a in adaptive],
        idle=idle,
        idle_adaptive=idle_adaptive,
        weight_share=1.0,
    )


ONE = torch.ones(())


# -- perturbation ------------------------------------------------------------------------------

SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4, 2))


def case(seed, *, masks, tensors=6):
    """Return random units: gradients, parameters, m/p, p, rho, adaptive, weight masks."""
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), tensors)]
    gradients = [rng.standard_normal(s) for s in shapes]
    parameters = [rng.standard_normal(s) for s in shapes]
    probability = rng.uniform(0.2, 1.0, tensors)
    chosen = rng.random(tensors) < 0.6
    chosen[rng.integers(tensors)] = True
    rho = rng.choice([0.05, 0.3, 2.0], tensors)
    adaptive = rng.random(tensors) < 0.5
    drawn = [np.asarray(rng.random(s) < 0.5) for s in shapes] if masks else None
    return gradients, parameters, chosen, probability, rho, adaptive, drawn


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.float64,), (torch.float32, torch.float64)],
    ids=["float32", "float64", "in turn"],
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masks", [False, True], ids=["tensors", "weights"])
def test_perturbations(norm, masks, dtypes):
    dtype = dtypes[0]  # the coarsest
    for seed in range(40):
        gradients, parameters, chosen, probability, rho, adaptive, drawn = case(seed, masks=masks)
        scale = [
            (1.0 / p if m else 0.0) * (1.0 if drawn is None else drawn[t])
            for t, (m, p) in enumerate(zip(chosen, probability, strict=True))
        ]
        known = [g if m or norm == "full" else None for g, m in zip(gradients, chosen, strict=True)]
        kwargs = {"norm": norm, "adaptive": adaptive}
        wanted = perturbations(known, parameters, scale, rho=rho, norm_eps=1e-9, **kwargs)
        kwargs["norm"] = "masked" if norm == "none" else norm
        length = perturbation_norm(known, parameters, scale, **kwargs)

        moved = [t for t in range(len(chosen)) if chosen[t]]
        still = [t for t in range(len(chosen)) if not chosen[t]] if norm == "full" else []
        of = [dtypes[t % len(dtypes)] for t in range(len(chosen))]
        theta = [torch.tensor(p, dtype=d) for p, d in zip(parameters, of, strict=True)]
        ascent = perturb(
            [torch.tensor(gradients[t], dtype=of[t]) for t in moved + still],
            targets_of(
                [theta[t] for t in moved],
                [1.0 / probability[t] for t in moved],
                [rho[t] for t in moved],
                [adaptive[t] for t in moved],
                [theta[t] for t in still],
                [bool(adaptive[t]) for t in still],
            ),
            torch.ones(3, dtype=dtype),
            torch.ones((), dtype=dtype),
            norm=norm,
            norm_eps=1e-9,
            weight_masks=None if drawn is None else [torch.tensor(drawn[t]) for t in moved],
        )
        tolerance = 64 * torch.finfo(dtype).eps
        for t, epsilon in zip(moved, ascent.perturbations, strict=True):
            assert epsilon.dtype == of[t]
            np.testing.assert_allclose(epsilon.numpy(), wanted[t], rtol=tolerance, atol=1e-30)
        np.testing.assert_allclose(float(ascent.gradient_norm), length, rtol=tolerance)
        total = np.sqrt(sum(float(np.sum(e * e)) for e in wanted))
        np.testing.assert_allclose(float(ascent.perturbation_norm), total, rtol=tolerance)
        assert float(ascent.flaw) == 0.0
        for t in moved:  # parameters are read but not changed
            assert theta[t].tolist() == torch.tensor(parameters[t], dtype=of[t]).tolist()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_nonfinite_gradient_makes_no_perturbation(norm, bad, where):
    """A loss that is not finite only reaches the gradients."""
    gradients = [torch.ones(3), torch.ones(2)]
    losses = torch.ones(4)
    (gradients[0] if where == "gradient" else losses)[1] = bad
    ascent = perturb(
        gradients,
        targets_of([torch.ones(3), torch.ones(2)], [2.0, 1.0], [0.1, 0.1], [True, False]),
        losses,
        ONE,
        norm=norm,
        norm_eps=1e-12,
    )
    assert ascent.flaw.isnan()
    perturbed = where == "loss"
    assert all(bool((e != 0).all()) == perturbed for e in ascent.perturbations)
    assert all(bool(e.isfinite().all()) for e in ascent.perturbations)
    assert (float(ascent.perturbation_norm) > 0.0) == perturbed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm_eps", [1e-12, 1e-300])
def test_a_zero_gradient_gives_a_zero_perturbation(dtype, norm_eps):
    ascent = perturb(
        [torch.zeros(3, dtype=dtype), torch.zeros(2, dtype=dtype)],
        targets_of(
            [torch.ones(3, dtype=dtype), torch.ones(2, dtype=dtype)],
            [2.0, 1.0],
            [0.1, 0.3],
            [False, False],
        ),
        torch.ones(4),
        ONE,
        norm="masked",
        norm_eps=norm_eps,
    )
    assert all(torch.equal(e, torch.zeros_like(e)) for e in ascent.perturbations)
    assert float(ascent.flaw) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_digits(dtype):
    """The norm is accumulated in float32, and the small factor is not rounded before use."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(s, generator=generator).to(dtype) for s in (50_000, 300)]
    ascent = perturb(
        [g.clone() for g in exact],
        targets_of([torch.ones_like(g) for g in exact], [1.6, 1.6], [0.05, 0.05], [False, False]),
        torch.ones(4),
        ONE,
        norm="masked",
        norm_eps=1e-12,
    )
    length = torch.cat([g.double() for g in exact]).norm()
    assert float(ascent.gradient_norm) == pytest.approx(float(length), rel=1e-5)
    for g, epsilon in zip(exact, ascent.perturbations, strict=True):
        wanted = 1.6 * 0.05 * g.double() / length
        error = (epsilon.double() - wanted).norm() / wanted.norm()
        assert error < torch.finfo(dtype).eps
