"""The size of the perturbation, and its norms."""

from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close, equal_all, has_nonfinite, require
from esam_core.conformance.problems import flat, mlp
from esam_core.conformance.trace import Run, follow, shows
from esam_core.perturbation import NORMS
from esam_core.reference.network import Network
from esam_core.reference.step import mean_weights
from esam_core.samplers import Bernoulli, Suffix
from esam_core.selectors import Proportional, Selector, TopIncrease

__all__ = ["CHECKS"]


@check("perturbation_norm")
def check_radius(adapter: Adapter) -> None:
    """With the default norm, ||epsilon|| is rho / beta for random masks and rho for fixed ones."""
    dtype, problem, rho = adapter.dtypes[0], mlp(), 0.2
    for sampler, radius in (
        (Bernoulli(0.5), rho / 0.5),
        (Bernoulli(1.0), rho),
        (Suffix("second"), rho),
    ):
        # A norm_eps that is negligible even in float64.
        esam = {"rho": rho, "perturb": sampler, "gamma": 0.5, "seed": 3, "norm_eps": 1e-30}
        run = Run(problem=problem, esam=esam)
        session = run.on(adapter)
        for i, batch in enumerate(problem.batches[:3]):
            shown = session.step(batch)
            close(
                f"{sampler}, step {i}: perturbation_norm",
                shown.perturbation_norm,
                radius,
                kind="norms",
                dtype=dtype,
            )


@check("gradient_norm", "perturbed")
def check_norm_is_that_of_the_masked_units(adapter: Adapter) -> None:
    """With the default norm, ||g|| is one norm over only the perturbed parameters."""
    dtype, problem = adapter.dtypes[0], mlp()
    run = Run(problem=problem, esam={"rho": 0.2, "beta": 0.5, "gamma": 0.5, "seed": 3})
    session = run.on(adapter)
    batch = problem.batches[0]
    shown = session.step(batch)
    evaluation = Network(problem.layers).evaluate(batch)
    gradient = evaluation.gradient(mean_weights(len(batch.targets)))
    perturbed = shown.perturbed or ()
    require(
        0 < len(perturbed) < len(gradient),
        f"perturbed: {perturbed}; expected some of them, not all.",
    )
    expected = np.sqrt(sum(np.sum(gradient[name] ** 2) for name in perturbed))
    close("gradient_norm", shown.gradient_norm, expected, kind="norms", dtype=dtype)


@check()
def check_norm_modes(adapter: Adapter) -> None:
    """`norm="estimated"`, `"full"` and `"none"` give the reference's perturbation."""
    for norm in ("estimated", "full", "none"):
        esam = {"rho": 0.3, "beta": 0.5, "gamma": 0.5, "norm": norm, "seed": 3}
        follow(adapter, Run(problem=mlp(), esam=esam), steps=3)


@check()
def check_norm_eps(adapter: Adapter) -> None:
    """`norm_eps` is added to the norm."""
    esam = {"rho": 0.3, "beta": 1.0, "gamma": 0.5, "norm_eps": 0.5}
    follow(adapter, Run(problem=mlp(), esam=esam), steps=2)


@check()
def check_adaptive(adapter: Adapter) -> None:
    """`adaptive`: epsilon is along theta^2 g, with the norm of |theta| g, for every norm."""
    for beta, norm in ((1.0, "masked"), *((0.5, norm) for norm in NORMS)):
        esam = {"rho": 0.5, "beta": beta, "gamma": 0.5, "adaptive": True, "norm": norm, "seed": 3}
        follow(adapter, Run(problem=mlp(), esam=esam), steps=3)


@check()
def check_zero_gradient(adapter: Adapter) -> None:
    """A gradient of exactly zero gives no perturbation, and no NaN from 0 / 0.

    Also with a `norm_eps` that is 0 in float32, and with a draw in proportion to increases, which
    are all 0.
    """
    problem = flat()
    cases: tuple[tuple[float, Selector], ...] = (
        (1e-12, TopIncrease(0.5)),
        (1e-12, Proportional(0.5, score="increase")),
        (1e-50, TopIncrease(0.5)),
    )
    for dtype in adapter.dtypes:
        for norm_eps, select in cases:
            esam = {"rho": 0.3, "beta": 1.0, "select": select, "norm_eps": norm_eps}
            session = Run(problem=problem, esam=esam).on(adapter, dtype)
            before = session.weights()
            shown = session.step(problem.batches[0])
            where = f"a step on a zero gradient, norm_eps={norm_eps}, {select}, {dtype}"
            if shows(adapter, "perturbation_norm"):
                length = float(shown.perturbation_norm or 0.0)
                require(length == 0.0, f"perturbation_norm: expected 0 after {where}: {length}.")
            bad = [name for name, found in has_nonfinite(session.weights()).items() if found]
            require(not bad, f"weights {bad} are not finite after {where}.")
            equal_all(f"weights after {where}", session.weights(), before)


@check("groups")
def check_groups(adapter: Adapter) -> None:
    """Parameters may have their own rho, adaptive and perturb, with one norm over all of them.

    With `norm="full"`, it includes the gradients of those with `perturb=False`.
    """
    groups: dict[str, dict[str, Any]] = {
        "first.weight": {"rho": 0.6},
        "first.bias": {"rho": 0.6},
        "second.weight": {"adaptive": True},
        "second.bias": {"adaptive": True},
        "head.weight": {"perturb": False},
        "head.bias": {"perturb": False},
    }
    for beta, norm in ((1.0, "masked"), *((0.5, norm) for norm in NORMS)):
        esam = {"rho": 0.2, "beta": beta, "gamma": 0.5, "norm": norm, "seed": 3}
        follow(adapter, Run(problem=mlp(), esam=esam, groups=groups), steps=3)


@check("groups")
def check_groups_without_a_radius(adapter: Adapter) -> None:
    """A parameter with rho = 0 of its own is not perturbed, and not in the norm.

    If rho is 0, a parameter with a rho of its own is perturbed.
    """
    groups = {name: {"rho": 0.0} for name in ("first.bias", "second.weight", "second.bias")}
    run = Run(problem=mlp(), esam={"rho": 0.2, "beta": 1.0, "gamma": 0.5}, groups=groups)
    follow(adapter, run, steps=2)
    own = {name: {"rho": 0.2} for name in ("second.weight", "second.bias")}
    run = Run(problem=mlp(), esam={"rho": 0.0, "beta": 1.0, "gamma": 0.5}, groups=own)
    follow(adapter, run, steps=2)


CHECKS = (
    check_radius,
    check_norm_is_that_of_the_masked_units,
    check_norm_modes,
    check_norm_eps,
    check_adaptive,
    check_zero_gradient,
    check_groups,
    check_groups_without_a_radius,
)
