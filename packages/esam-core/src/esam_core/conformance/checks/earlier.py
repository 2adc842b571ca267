"""`ascend=Previous()` and `Momentum()`: ascent directions from earlier steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter, Fault
from esam_core.conformance.by_hand import mean_gradient, peak_gradient
from esam_core.conformance.checks.limits import require_base_steps
from esam_core.conformance.checks.passes import require_random_state_of_a_forward
from esam_core.conformance.checks.registry import check
from esam_core.conformance.checks.restoring import (
    InjectedError,
    make_failing_step,
    require_nonfinite,
    steps_beside_reference,
)
from esam_core.conformance.compare import close, close_all, equal
from esam_core.conformance.problems import batchnorm, linear, mlp, softmax, with_nan
from esam_core.conformance.trace import SGD, Run, compare_state, follow, resume, same_state, shows
from esam_core.directions import Batch, Direction, Momentum, Part, Previous
from esam_core.problem import Base
from esam_core.reference.network import Network
from esam_core.samplers import Bernoulli, Suffix
from esam_core.schedules import Between, Every
from esam_core.selectors import All, Proportional, Random, TopIncrease, TopLoss

__all__ = ["CHECKS"]

_EARLIER: tuple[Direction, ...] = (Previous(), Momentum())


@check("ascend")
def check_first_step_is_a_base_step(adapter: Adapter) -> None:
    """Without an earlier step there is no direction: a base step, at its cost."""
    for ascend in _EARLIER:
        esam = {"rho": 0.5, "beta": 1.0, "gamma": 0.5, "ascend": ascend}
        require_base_steps(adapter, esam, steps=1)


@check("ascend")
def check_climb_along_the_previous_gradient(adapter: Adapter) -> None:
    """`Previous()` is SAM along the previous update's gradient, computed here by hand."""
    dtype, problem, rho, lr = adapter.dtypes[0], mlp(), 0.3, 0.1
    for sign in (1, -1):
        esam = {
            "rho": rho,
            "beta": 1.0,
            "gamma": 1.0,
            "ascend": Previous(sign),
            "norm_eps": 1e-30,
        }
        session = Run(problem=problem, esam=esam, base=Base("sgd", lr=lr)).on(adapter)
        network = Network(problem.layers)
        theta = network.parameters
        before: dict[str, Any] = {}
        for i, batch in enumerate(problem.batches[:4]):
            session.step(batch)
            if before:
                before = peak_gradient(network, batch, before, sign * rho)
            else:
                before = mean_gradient(network, batch)
            for name, g in before.items():
                theta[name] -= lr * g
            close_all(
                f"Previous({sign}), step {i}: weights",
                session.weights(),
                theta,
                kind="weights",
                dtype=dtype,
            )


@check("ascend", "perturbed_losses", "gradient_norm")
def check_previous_is_sam_where_the_gradient_is_constant(adapter: Adapter) -> None:
    """On a loss that is linear in the weights, `Previous()` equals SAM from the second step on.

    The loss at theta + epsilon is then higher by exactly rho ||g||.
    """
    dtype, problem, rho = adapter.dtypes[0], linear(), 0.3
    esam = {"rho": rho, "beta": 1.0, "gamma": 1.0, "norm_eps": 1e-30}
    ours = Run(problem=problem, esam={**esam, "ascend": Previous()}, base=SGD).on(adapter)
    sam = Run(problem=problem, esam=esam, base=SGD).on(adapter)
    batch = problem.batches[0]
    for i in range(4):
        network = Network(problem.layers)
        for name, theta in ours.weights().items():
            network.parameters[name][...] = theta
        losses = network.evaluate(batch).losses
        shown, wanted = ours.step(batch), sam.step(batch)
        same_state(f"step {i}, against SAM's", ours, sam, dtype)
        if i == 0:
            continue
        length = float(wanted.gradient_norm or 0.0)
        close(
            f"step {i}: gradient_norm against SAM's",
            float(shown.gradient_norm or 0.0),
            length,
            kind="norms",
            dtype=dtype,
        )
        close(
            f"step {i}: mean of the losses at theta + epsilon",
            float(np.mean(np.asarray(shown.perturbed_losses, dtype=np.float64))),
            float(np.mean(losses)) + rho * length,
            kind="losses",
            dtype=dtype,
        )


@check("ascend")
def check_earlier_directions_beside_the_reference(adapter: Adapter) -> None:
    """Samplers, selectors, norms, schedules and BatchNorm with the directions of earlier steps."""
    cases: tuple[dict[str, Any], ...] = (
        {"beta": 0.5, "select": All()},
        {"beta": 1.0, "select": Random(0.5)},
        {"perturb": Suffix("norm"), "select": TopLoss(0.5)},
        {"beta": 0.5, "select": TopIncrease(0.5), "norm": "estimated"},
        {"beta": 0.5, "select": Proportional(0.5), "norm": "full"},
        {"perturb": Every(2, Bernoulli(0.5), scale_rho=True), "select": All(), "norm": "none"},
        {"perturb": Between(1, 3), "select": All(), "adaptive": True},
        {"perturb": Suffix("norm"), "select": All(), "norm": "full"},
    )
    for ascend in _EARLIER:
        for case in cases:
            esam = {"rho": 0.2, "ascend": ascend, "seed": 3, **case}
            follow(adapter, Run(problem=batchnorm(), esam=esam), steps=4)


@check("ascend", "passes")
def check_passes_without_an_ascent(adapter: Adapter) -> None:
    """A direction from earlier steps needs no pass, and losses at theta only if used."""
    problem = softmax()
    cases: tuple[tuple[Any, tuple[int, ...]], ...] = (
        (All(), (8,)),
        (Random(0.5), (4,)),
        (TopLoss(0.5), (8, 4)),
        (Proportional(0.5), (8, 4)),
        (TopIncrease(0.5), (8, 8, 4)),
        (TopIncrease(1.0), (8,)),
    )
    for ascend in _EARLIER:
        for select, passes in cases:
            esam = {"rho": 0.1, "beta": 1.0, "select": select, "ascend": ascend}
            session = Run(problem=problem, esam=esam).on(adapter)
            session.step(problem.batches[0])
            shown = session.step(problem.batches[1])
            equal(f"{ascend}, {select}: samples per pass", shown.passes, passes)
            if shows(adapter, "losses"):
                known = shown.losses is not None
                equal(f"{ascend}, {select}: losses at theta", known, len(passes) > 1)


@check("ascend")
def check_rho_zero_with_any_direction(adapter: Adapter) -> None:
    """With rho = 0 a step is a base step, for every direction."""
    directions: tuple[Direction, ...] = (Batch(), Part(0.5), *_EARLIER)
    for ascend in directions:
        require_base_steps(adapter, {"rho": 0.0, "beta": 1.0, "gamma": 0.5, "ascend": ascend})


@check("ascend", "backward")
def check_one_direction_an_update(adapter: Adapter) -> None:
    """All batches of an accumulated update use the gradient of the previous update."""
    dtype, problem = adapter.dtypes[0], mlp()
    for ascend in _EARLIER:
        run = Run(problem=problem, esam={"rho": 0.3, "beta": 1.0, "gamma": 1.0, "ascend": ascend})
        actual, expected = run.on(adapter), run.on_reference(adapter)
        for update in range(2):
            for session in (actual, expected):
                session.zero_gradients()
            for i, batch in enumerate(problem.batches[3 * update : 3 * update + 3]):
                shown, wanted = actual.backward(batch), expected.backward(batch)
                where = f"{ascend}, update {update}, batch {i}"
                if shows(adapter, "gradient_norm"):
                    found, norm = shown.gradient_norm or 0.0, wanted.gradient_norm or 0.0
                    close(f"{where}: norm", float(found), float(norm), kind="norms", dtype=dtype)
                close_all(
                    f"{where}: gradients",
                    actual.gradients(),
                    expected.gradients(),
                    kind="gradient",
                    dtype=dtype,
                )
            for session in (actual, expected):
                session.apply()
            compare_state(f"{ascend}, update {update}", actual, expected, dtype)


@check("ascend", "state")
def check_direction_is_saved(adapter: Adapter) -> None:
    """A saved and loaded run resumes with the same direction, for every direction."""
    directions: tuple[Direction, ...] = (Part(0.5), *_EARLIER)
    for ascend in directions:
        esam = {"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3, "ascend": ascend}
        adamw = Base("adamw", lr=0.01, weight_decay=0.1)
        resume(adapter, Run(problem=batchnorm(), esam=esam, base=adamw))


@check("ascend", "state")
def check_loading_replaces_the_direction(adapter: Adapter) -> None:
    """A session that has run can load the state before its first step, without a direction."""
    problem = mlp()
    run = Run(problem=problem, esam={"rho": 0.3, "beta": 1.0, "ascend": Previous()})
    used, new = run.on(adapter), run.on(adapter)
    start: Any = used.state()
    for batch in problem.batches[:2]:
        used.step(batch)
    used.load(start)
    for i, batch in enumerate(problem.batches[2:4]):
        used.step(batch)
        new.step(batch)
        same_state(f"step {i} after going back", used, new, adapter.dtypes[0])


@check("ascend", "faults")
def check_a_failed_step_keeps_the_direction(adapter: Adapter) -> None:
    """If a pass raises, the step can be repeated with the same direction."""
    problem = batchnorm()
    cases: tuple[tuple[Direction, tuple[int, ...]], ...] = (
        (Previous(), (1, 2, 3)),
        (Momentum(), (1, 2, 3)),
        (Part(0.5), (1, 2, 3, 4)),
    )
    for ascend, calls in cases:
        run = Run(problem=problem, esam={"rho": 0.3, "beta": 1.0, "gamma": 0.5, "ascend": ascend})
        failing, smooth = run.on(adapter), run.on(adapter)
        failing.step(problem.batches[0])
        smooth.step(problem.batches[0])
        for i, batch in enumerate(problem.batches[1:3]):
            for call in calls:
                where = f"{ascend}, step {i}, pass {call}"
                fault = Fault(call, InjectedError("in a pass"))
                make_failing_step(adapter, failing, fault, batch, where)
            failing.step(batch)
            smooth.step(batch)
            same_state(
                f"{ascend}, step {i} repeated after failures", failing, smooth, adapter.dtypes[0]
            )


@check("ascend")
def check_nonfinite_steps_with_any_direction(adapter: Adapter) -> None:
    """`on_nonfinite="skip"`, `"raise"`: a bad step does not affect the next direction."""
    problem = batchnorm()
    directions: tuple[Direction, ...] = (Part(0.5), *_EARLIER)
    for ascend in directions:
        for mode in ("skip", "raise"):
            esam: Mapping[str, Any] = {
                "rho": 0.3,
                "beta": 1.0,
                "gamma": 1.0,
                "seed": 3,
                "ascend": ascend,
                "on_nonfinite": mode,
            }
            steps_beside_reference(adapter, esam, problem)


@check("ascend", "perturbation_norm")
def check_a_nan_loss_beside_a_finite_direction(adapter: Adapter) -> None:
    """With `Previous` a loss that is NaN reaches every gradient; its direction still perturbs."""
    problem, rho = mlp(), 0.3
    for select in (TopLoss(0.5), TopIncrease(0.5)):
        esam = {"rho": rho, "beta": 1.0, "select": select, "ascend": Previous(), "norm_eps": 1e-30}
        session = Run(problem=problem, esam=esam).on(adapter)
        session.step(problem.batches[0])  # a base step: there is no direction yet
        shown = session.step(with_nan(problem.batches[1], 5))
        where = f"{select}, a loss is NaN"
        length, dtype = shown.perturbation_norm, adapter.dtypes[0]
        close(f"{where}: perturbation_norm", length, rho, kind="norms", dtype=dtype)
        require_nonfinite(where, session.weights())


@check("ascend", "dropout", "random")
def check_random_state_with_an_earlier_direction(adapter: Adapter) -> None:
    """If a pass without gradients sees the whole batch, generators advance as in one forward."""
    esam = {"rho": 0.1, "beta": 1.0, "select": TopLoss(0.5), "ascend": Previous()}
    require_random_state_of_a_forward(adapter, esam)


CHECKS = (
    check_first_step_is_a_base_step,
    check_climb_along_the_previous_gradient,
    check_previous_is_sam_where_the_gradient_is_constant,
    check_earlier_directions_beside_the_reference,
    check_passes_without_an_ascent,
    check_rho_zero_with_any_direction,
    check_one_direction_an_update,
    check_direction_is_saved,
    check_loading_replaces_the_direction,
    check_a_failed_step_keeps_the_direction,
    check_nonfinite_steps_with_any_direction,
    check_a_nan_loss_beside_a_finite_direction,
    check_random_state_with_an_earlier_direction,
)
