"""Which parameters a step perturbs."""

from dataclasses import replace

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import equal, require
from esam_core.conformance.problems import (
    batchnorm,
    convolution,
    embedding,
    mlp,
)
from esam_core.conformance.trace import Run, follow, shows
from esam_core.problem import Base, Problem
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
    """The mask is that of (seed, count) for this step, and another seed gives other masks.

    A seed may have up to 63 bits.
    """
    problem, masks = mlp(), []
    for seed in (3, 11, 2**62 + 3):
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
    # Frozen parameters are not units: the mask of the others does not depend on them.
    follow(adapter, replace(run, esam={"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3}), steps=3)


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
    check_frozen_parameters,
)
