"""Which parameters a step perturbs."""

from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close, equal, require
from esam_core.conformance.problems import (
    batchnorm,
    convolution,
    dropout,
    embedding,
    linear,
    mlp,
)
from esam_core.conformance.trace import Run, follow, shows
from esam_core.problem import Base, Dropout, Problem
from esam_core.reference.network import Network
from esam_core.samplers import Bernoulli, Only, RandomSuffix, Sampler, Suffix
from esam_core.schedules import Every, Sometimes

__all__ = ["CHECKS"]


def _perturbed_names(problem: Problem, sampler: Sampler, seed: int, count: int) -> tuple[str, ...]:
    """Return the names that a sampler perturbs in one step."""
    units = Network(problem.layers).units
    mask = sampler.draw(units, seed=seed, count=count)
    return tuple(unit.name for unit, m in zip(units, mask.perturbed, strict=True) if m)


@check("perturbed")
def check_each_step_has_its_own_mask(adapter: Adapter) -> None:
    """The mask is that of (seed, count) for this step, and another seed gives other masks."""
    problem, masks = mlp(), []
    for seed in (3, 11):
        session = Run(problem=problem, esam={"beta": 0.5, "gamma": 0.5, "seed": seed}).on(adapter)
        for count, batch in enumerate(problem.batches):
            expected = _perturbed_names(problem, Bernoulli(0.5), seed, count)
            shown = session.step(batch).perturbed
            equal(f"seed {seed}, step {count}: perturbed", shown, expected)
            masks.append(shown)
    require(len(set(masks)) > 4, "perturbed: the masks of most steps are equal, but must differ.")


@check()
def check_perturbation_follows_the_mask(adapter: Adapter) -> None:
    """With random masks and all samples, gradient and weights match the reference."""
    follow(
        adapter,
        Run(problem=mlp(), esam={"rho": 0.3, "beta": 0.5, "gamma": 1.0, "seed": 3}),
        steps=6,
    )


@check("perturbed")
def check_suffix(adapter: Adapter) -> None:
    """`Suffix` perturbs the named block and all later ones, in every step, without rescaling."""
    problem = convolution()
    run = Run(problem=problem, esam={"rho": 0.3, "perturb": Suffix("body"), "gamma": 0.5})
    session = run.on(adapter)
    names = (
        "body.weight",
        "body_norm.weight",
        "body_norm.bias",
        "head.weight",
        "head.bias",
    )
    for i, batch in enumerate(problem.batches[:2]):
        equal(f"step {i}: perturbed", session.step(batch).perturbed, names)
    follow(adapter, run, steps=2)


@check()
def check_random_suffix(adapter: Adapter) -> None:
    """`RandomSuffix` draws one cut per step and divides by each unit's own probability."""
    sampler = RandomSuffix(("first", "second", "head"), (0.25, 0.25, 0.5))
    follow(
        adapter, Run(problem=mlp(), esam={"rho": 0.3, "perturb": sampler, "gamma": 1.0}), steps=6
    )


@check("perturbed")
def check_only_one_kind(adapter: Adapter) -> None:
    """`Only` perturbs parameters of one kind: norm layers, biases or embeddings."""
    cases: tuple[tuple[Problem, str, tuple[str, ...]], ...] = (
        (batchnorm(), "norm", ("norm.weight", "norm.bias")),
        (mlp(), "bias", ("first.bias", "second.bias", "head.bias")),
        (embedding(), "embedding", ("table.weight",)),
    )
    for problem, kind, names in cases:
        run = Run(problem=problem, esam={"rho": 0.3, "perturb": Only(kind), "gamma": 0.5})
        shown = run.on(adapter).step(problem.batches[0]).perturbed
        equal(f"Only({kind!r}): perturbed", shown, names)
        follow(adapter, run, steps=2)


@check()
def check_schedules(adapter: Adapter) -> None:
    """`Every` and `Sometimes` perturb on some steps, unrescaled; the others are base steps."""
    for sampler in (Every(2, Bernoulli(0.5)), Sometimes(0.5)):
        run = Run(problem=mlp(), esam={"rho": 0.3, "perturb": sampler, "gamma": 0.5, "seed": 2})
        follow(adapter, run, steps=6)


#: The probability with which the checks below draw single weights.
_BETA = 0.3


def _weight_masks(problem: Problem, rho: float, norm: str, gamma: float = 1.0) -> Run:
    """Return a run that perturbs single weights, and does not move."""
    esam: dict[str, Any] = {
        "rho": rho,
        "perturb": Bernoulli(_BETA, unit="weight"),
        "gamma": gamma,
        "norm": norm,
        "norm_eps": 1e-30,
    }
    return Run(problem=problem, esam=esam, base=Base("sgd", lr=0.0))


@check("perturbation_norm", "weight_masks")
def check_masks_of_single_weights(adapter: Adapter) -> None:
    """`unit="weight"`: each scalar weight is drawn with probability beta, independently per step.

    With norm="none", epsilon = (rho / beta) m g: at lr = 0, (beta ||eps|| / rho)^2 / ||g||^2 has
    the mean beta, and the standard deviation of independent weights: that of whole rows or tensors
    is more than twice as large. The backend draws with its own generator, so only this distribution
    is checked.
    """
    rho, beta, steps = 0.01, _BETA, 100
    layers = tuple(layer for layer in dropout().layers if not isinstance(layer, Dropout))
    problem = Problem("wide", layers, dropout().batches)
    batch = problem.batches[0]
    run = _weight_masks(problem, rho, "none")
    session = run.on(adapter)
    even = np.full(len(batch.targets), 1.0 / len(batch.targets))
    gradient = Network(problem.layers).evaluate(batch).gradient(even)
    squares = np.concatenate([a.ravel() ** 2 for a in gradient.values()])
    total = squares.sum()
    shares = []
    for _ in range(steps):
        length = session.step(batch).perturbation_norm
        require(length is not None, "perturbation_norm: expected a number, got None.")
        shares.append((beta * float(length or 0.0) / rho) ** 2 / total)
    deviation = np.sqrt(beta * (1 - beta) * np.sum(squares**2)) / total
    mean, found = float(np.mean(shares)), float(np.std(shares))
    require(
        abs(mean - beta) < 5 * deviation / np.sqrt(steps),
        f"mean perturbed share of ||g||^2: expected {beta}, got {mean:.3f}.",
    )
    require(
        found > deviation / 2,
        "the perturbed share of ||g||^2 hardly varies: the mask is not drawn in each step.",
    )
    require(
        found < 1.5 * deviation,
        f"the perturbed share of ||g||^2 has a standard deviation of {found:.3f}, and "
        f"{deviation:.3f} if each weight is drawn independently: rows or tensors are drawn.",
    )
    again = run.on(adapter)
    repeated = [again.step(batch).perturbation_norm for _ in range(3)]
    expected = [rho / beta * np.sqrt(share * total) for share in shares[:3]]
    require(
        bool(np.allclose(np.asarray(repeated, dtype=float), expected, rtol=1e-4)),
        "a second run with the same seed draws different masks of single weights.",
    )


@check("perturbation_norm", "weight_masks")
def check_norm_of_single_weights(adapter: Adapter) -> None:
    """The norm is over the drawn weights: ||epsilon|| = rho / beta ("estimated": / sqrt(beta))."""
    dtype, rho, problem = adapter.dtypes[0], 0.2, mlp()
    for norm, radius in (("masked", rho / _BETA), ("estimated", rho / np.sqrt(_BETA))):
        session = _weight_masks(problem, rho, norm).on(adapter)
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
    session = _weight_masks(problem, rho, "none", gamma=0.5).on(adapter)
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


@check("frozen")
def check_frozen_parameters(adapter: Adapter) -> None:
    """Frozen parameters are not perturbed, updated or in the norm, and stay frozen."""
    problem = mlp()
    frozen = ("first.weight", "first.bias")
    run = Run(
        problem=problem,
        esam={"rho": 0.3, "beta": 1.0, "gamma": 0.5},
        base=Base("sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
        frozen=frozen,
    )
    flags = {name: name not in frozen for name in Network(problem.layers).parameters}
    session = run.on(adapter)
    equal("trainable before", sorted(session.trainable().items()), sorted(flags.items()))
    before = session.weights()
    shown = session.step(problem.batches[0])
    equal("trainable after", sorted(session.trainable().items()), sorted(flags.items()))
    if shows(adapter, "perturbed"):
        require(
            not set(frozen) & set(shown.perturbed or ()),
            f"perturbed: frozen parameters are among {shown.perturbed}.",
        )
    after = session.weights()
    for name in frozen:
        equal(f"frozen {name!r}", after[name], before[name])
    follow(adapter, run, steps=3)


@check()
def check_schedule_that_scales_rho(adapter: Adapter) -> None:
    """`Every(n, scale_rho=True)` multiplies rho by n on the steps that perturb, for every norm."""
    for norm in ("masked", "estimated", "none"):
        perturb = Every(2, Bernoulli(0.5), scale_rho=True)
        esam = {"rho": 0.2, "perturb": perturb, "gamma": 0.5, "norm": norm, "seed": 3}
        follow(adapter, Run(problem=mlp(), esam=esam), steps=3)


CHECKS = (
    check_each_step_has_its_own_mask,
    check_perturbation_follows_the_mask,
    check_suffix,
    check_random_suffix,
    check_only_one_kind,
    check_schedules,
    check_schedule_that_scales_rho,
    check_masks_of_single_weights,
    check_norm_of_single_weights,
    check_single_weights_are_perturbed,
    check_frozen_parameters,
)
