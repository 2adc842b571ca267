"""Masks of single weights, `Bernoulli(beta, unit="weight")`.

A backend draws them with its own generator, so that only their distribution is checked. With
norm="none", epsilon = (rho / beta) m g: at lr = 0, (beta ||eps|| / rho)^2 / ||g||^2 is the share of
||g||^2 that is perturbed. It has the mean beta and the standard deviation of independent weights.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core.conformance.adapter import Adapter, Session
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close, require
from esam_core.conformance.problems import alike, dropout, linear, mlp
from esam_core.conformance.trace import Run
from esam_core.problem import Base, Batch, Dropout, Problem
from esam_core.reference.network import Network
from esam_core.reference.step import mean_weights
from esam_core.samplers import Bernoulli

__all__ = ["CHECKS"]

Array = NDArray[Any]

#: The probability with which single weights are drawn, and the number of steps that are averaged.
_BETA, _STEPS = 0.3, 100

#: The radius where no norm divides it.
_RHO = 0.01


def _run(
    problem: Problem,
    rho: float = _RHO,
    norm: str = "none",
    gamma: float = 1.0,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    **esam: Any,
) -> Run:
    """Return a run that perturbs single weights, and does not move."""
    arguments: dict[str, Any] = {
        "rho": rho,
        "perturb": Bernoulli(_BETA, unit="weight"),
        "gamma": gamma,
        "norm": norm,
        "norm_eps": 1e-30,
        **esam,
    }
    still = Base("sgd", lr=0.0)
    return Run(problem=problem, esam=arguments, base=still, groups=groups or {})


def _wide() -> Problem:
    """Return a network with one wide layer, without dropout."""
    layers = tuple(layer for layer in dropout().layers if not isinstance(layer, Dropout))
    return Problem("wide", layers, dropout().batches)


def _gradient(problem: Problem) -> dict[str, Array]:
    """Return the gradient of the problem's first batch by name."""
    batch = problem.batches[0]
    evaluation = Network(problem.layers).evaluate(batch)
    return dict(evaluation.gradient(mean_weights(len(batch.targets))))


def _length(session: Session, batch: Batch) -> float:
    """Run a step and return ||epsilon||."""
    length = session.step(batch).perturbation_norm
    require(length is not None, "perturbation_norm: expected a number, got None.")
    return float(length or 0.0)


def _shares(session: Session, batch: Batch, squares: Array) -> tuple[Array, float]:
    """Return the perturbed shares of a sum of squares, and their expected standard deviation."""
    lengths = np.array([_length(session, batch) for _ in range(_STEPS)])
    total = float(np.sum(squares))
    deviation = float(np.sqrt(_BETA * (1 - _BETA) * np.sum(squares**2))) / total
    return (_BETA * lengths / _RHO) ** 2 / total, deviation


def _require_mean(what: str, shares: Array, deviation: float) -> None:
    """Require that the mean of the shares is beta, within five standard errors."""
    mean = float(np.mean(shares))
    require(
        abs(mean - _BETA) < 5 * deviation / np.sqrt(_STEPS),
        f"mean perturbed share of {what}: expected {_BETA}, got {mean:.3f}.",
    )


def _require_independent(shares: Array, deviation: float, otherwise: str) -> None:
    """Require that the shares vary as if each weight is drawn independently, or less."""
    found = float(np.std(shares))
    require(
        found < 1.5 * deviation,
        f"the perturbed share of ||g||^2 has a standard deviation of {found:.3f}, and "
        f"{deviation:.3f} if each weight is drawn independently: {otherwise}.",
    )


def _squares(arrays: Mapping[str, Array]) -> Array:
    """Return the squares of all elements of arrays."""
    return np.concatenate([a.ravel() ** 2 for a in arrays.values()])


@check("perturbation_norm", "weight_masks")
def check_masks_of_single_weights(adapter: Adapter) -> None:
    """Each scalar weight is drawn with probability beta, independently, in each step and run."""
    problem = _wide()
    batch, gradient = problem.batches[0], _gradient(problem)
    shares, deviation = _shares(_run(problem).on(adapter), batch, _squares(gradient))
    _require_mean("||g||^2", shares, deviation)
    require(
        float(np.std(shares)) > deviation / 2,
        "the perturbed share of ||g||^2 hardly varies: the mask is not drawn in each step.",
    )
    # The deviation is more than twice as large for whole rows or tensors.
    _require_independent(shares, deviation, "rows or tensors are drawn")
    for seed in (0, 1):
        session = _run(problem, seed=seed).on(adapter)
        lengths = np.array([_length(session, batch) for _ in range(3)])
        repeated = (_BETA * lengths / _RHO) ** 2 / np.sum(_squares(gradient))
        require(
            bool(np.allclose(repeated, shares[:3], rtol=2e-4)) is (seed == 0),
            "masks of single weights must depend on the seed, and on nothing else: a second run "
            f"with {'another' if seed else 'the same'} seed draws "
            f"{'the same' if seed else 'different'} masks.",
        )


@check("perturbation_norm", "weight_masks")
def check_tensors_draw_their_own_single_weights(adapter: Adapter) -> None:
    """The masks of different tensors are independent, also if these have the same shape."""
    problem = alike()
    gradient = _gradient(problem)
    shares, deviation = _shares(_run(problem).on(adapter), problem.batches[0], _squares(gradient))
    _require_mean("||g||^2", shares, deviation)
    # The deviation is more than twice as large with the same draws for all tensors.
    _require_independent(shares, deviation, "tensors share their draws")


@check("perturbation_norm", "weight_masks")
def check_adaptive_with_single_weights(adapter: Adapter) -> None:
    """`adaptive`: epsilon = (rho / beta) m theta^2 g also where single weights are drawn."""
    problem = _wide()
    theta, gradient = Network(problem.layers).parameters, _gradient(problem)
    squares = _squares({name: theta[name] ** 2 * g for name, g in gradient.items()})
    session = _run(problem, adaptive=True).on(adapter)
    _require_mean("||theta^2 g||^2", *_shares(session, problem.batches[0], squares))


@check("perturbation_norm", "weight_masks", "groups")
def check_groups_with_single_weights(adapter: Adapter) -> None:
    """No weight of a parameter with perturb=False is drawn; those of biases are."""
    problem = _wide()
    gradient = _gradient(problem)
    groups = {name: {"perturb": False} for name in gradient if name.endswith(".weight")}
    squares = _squares({name: g for name, g in gradient.items() if name not in groups})
    session = _run(problem, groups=groups).on(adapter)
    shares = _shares(session, problem.batches[0], squares)
    _require_mean("||g||^2 of the biases, with perturb=False for the others", *shares)


@check("perturbation_norm", "weight_masks")
def check_norm_of_single_weights(adapter: Adapter) -> None:
    """The norm is over the drawn weights: ||epsilon|| = rho / beta ("estimated": / sqrt(beta))."""
    dtype, rho, problem = adapter.dtypes[0], 0.2, mlp()
    for norm, radius in (("masked", rho / _BETA), ("estimated", rho / np.sqrt(_BETA))):
        session = _run(problem, rho, norm).on(adapter)
        for i, batch in enumerate(problem.batches[:3]):
            length = session.step(batch).perturbation_norm
            where = f"{norm}, step {i}: perturbation_norm"
            close(where, length, radius, kind="norms", dtype=dtype)


@check("perturbation_norm", "losses", "perturbed_losses", "weight_masks")
def check_single_weights_are_perturbed(adapter: Adapter) -> None:
    """The perturbation whose norm is reported is that of the weights.

    On a loss that is linear in the weights, epsilon = (rho / beta) m g increases it by exactly
    epsilon g = ||epsilon||^2 beta / rho.
    """
    dtype, rho, problem = adapter.dtypes[0], 0.3, linear()
    session = _run(problem, rho, gamma=0.5).on(adapter)
    for i, batch in enumerate(problem.batches):
        shown = session.step(batch)
        mean = float(np.mean(np.asarray(shown.losses, dtype=np.float64)))
        close(
            f"step {i}: mean of the losses at theta + epsilon",
            float(np.mean(np.asarray(shown.perturbed_losses, dtype=np.float64))),
            mean + float(shown.perturbation_norm or 0.0) ** 2 * _BETA / rho,
            kind="losses",
            dtype=dtype,
        )


CHECKS = (
    check_masks_of_single_weights,
    check_tensors_draw_their_own_single_weights,
    check_adaptive_with_single_weights,
    check_groups_with_single_weights,
    check_norm_of_single_weights,
    check_single_weights_are_perturbed,
)
