"""Special cases in which ESAM equals the base optimizer or SAM."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.by_hand import mean_gradient, peak_gradient
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close, close_all, equal, require
from esam_core.conformance.problems import batchnorm, mlp
from esam_core.conformance.trace import SGD, Run, call_text, same_state, shows
from esam_core.problem import Base
from esam_core.reference.network import Network
from esam_core.schedules import Between

__all__ = ["CHECKS"]


def require_base_steps(adapter: Adapter, esam: Mapping[str, Any], steps: int = 3) -> None:
    """Require that ESAM's first steps with these settings are the base optimizer's, at its cost."""
    dtype = adapter.dtypes[0]
    problem = batchnorm()
    ours = Run(problem=problem, esam=esam).on(adapter)
    base = Run(problem=problem, esam=None).on(adapter)
    for i, batch in enumerate(problem.batches[:steps]):
        shown = ours.step(batch)
        base.step(batch)
        where = f"{call_text(esam)}, step {i}"
        if shows(adapter, "passes"):
            equal(f"{where}: samples per pass", shown.passes, (len(batch.targets),))
        if shows(adapter, "perturbed"):
            equal(f"{where}: perturbed", shown.perturbed, ())
        for name in ("perturbed_losses", "indices", "sample_weights", "gradient_norm"):
            if shows(adapter, name):
                equal(f"{where}: {name}", getattr(shown, name), None)
        if shows(adapter, "perturbation_norm"):
            equal(f"{where}: perturbation_norm", shown.perturbation_norm, 0.0)
        same_state(f"{where}, against the base optimizer's", ours, base, dtype)


@check()
def check_rho_zero_is_the_base_optimizer(adapter: Adapter) -> None:
    """With rho = 0 a step is a base step on the whole batch, at its cost."""
    require_base_steps(adapter, {"rho": 0.0, "beta": 0.6, "gamma": 0.5})


@check()
def check_empty_mask_is_a_base_step(adapter: Adapter) -> None:
    """A step that perturbs nothing is a base step on the whole batch, at its cost."""
    require_base_steps(adapter, {"rho": 0.5, "perturb": Between(50), "gamma": 0.5})


@check()
def check_everything_is_sam(adapter: Adapter) -> None:
    """With beta = gamma = 1 a step is SAM's, computed here from gradients."""
    dtype, problem, rho, lr = adapter.dtypes[0], mlp(), 0.3, 0.1
    # A negligible norm_eps: SAM's equation has none.
    esam = {"rho": rho, "beta": 1.0, "gamma": 1.0, "norm_eps": 1e-30}
    session = Run(problem=problem, esam=esam, base=Base("sgd", lr=lr)).on(adapter)
    network = Network(problem.layers)
    theta = network.parameters
    for i, batch in enumerate(problem.batches[:3]):
        session.step(batch)
        ascent = mean_gradient(network, batch)
        for name, g in peak_gradient(network, batch, ascent, rho).items():
            theta[name] -= lr * g
        close_all(
            f"step {i}: weights against SAM's",
            session.weights(),
            theta,
            kind="weights",
            dtype=dtype,
        )


@check("losses", "perturbed_losses")
def check_losses_before_and_after(adapter: Adapter) -> None:
    """The reported losses are those at theta, and the full perturbation increases them."""
    dtype, problem = adapter.dtypes[0], mlp()
    session = Run(problem=problem, esam={"rho": 0.05, "beta": 1.0, "gamma": 0.5}, base=SGD).on(
        adapter
    )
    shown = session.step(problem.batches[0])
    losses = Network(problem.layers).evaluate(problem.batches[0]).losses
    close("losses at theta", shown.losses, losses, kind="losses", dtype=dtype)
    require(
        shown.perturbed_losses is not None
        and float(np.mean(shown.perturbed_losses)) > float(np.mean(losses)),
        "perturbed_losses: their mean must be above that of the losses: the perturbation "
        "increases the loss.",
    )


CHECKS = (
    check_rho_zero_is_the_base_optimizer,
    check_empty_mask_is_a_base_step,
    check_everything_is_sam,
    check_losses_before_and_after,
)
