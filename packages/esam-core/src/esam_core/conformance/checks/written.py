"""State that forwards write and later ones read: written once per step, for all passes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core.conformance.adapter import Adapter, Fault
from esam_core.conformance.checks.registry import check
from esam_core.conformance.checks.restoring import InjectedError, make_failing_step
from esam_core.conformance.compare import close, equal_all
from esam_core.conformance.problems import carry, with_nan
from esam_core.conformance.trace import Run, follow
from esam_core.directions import Momentum, Part, Previous
from esam_core.problem import Base, Batch, Carry, Dense
from esam_core.samplers import Bernoulli, Suffix
from esam_core.schedules import Between, Every
from esam_core.selectors import All, Proportional, Random, TopIncrease, TopLoss

__all__ = ["CHECKS"]

Array = NDArray[Any]

#: Steps with one, two and three passes, without perturbed weights, and with one sample.
_CASES: tuple[Mapping[str, Any], ...] = (
    {"beta": 0.5, "gamma": 0.5},
    {"beta": 1.0, "select": TopLoss(0.125)},
    {"beta": 1.0, "select": All()},
    {"perturb": Suffix("head"), "select": Random(0.5)},
    {"perturb": Every(2, Bernoulli(0.5)), "select": Proportional(0.5)},
    {"perturb": Between(50), "gamma": 0.5},
)

#: The same with an ascent pass on no sample or some. The first has a pass at theta on the batch.
_DIRECTIONS: tuple[Mapping[str, Any], ...] = (
    {"ascend": Previous(), "select": TopIncrease(0.5)},
    {"ascend": Part(0.5), "select": TopLoss(0.125)},
    {"ascend": Part(0.5), "gamma": 0.5},
    {"ascend": Part(0.5), "select": All()},
    {"ascend": Previous(), "select": All()},
    {"ascend": Momentum(), "select": Proportional(0.5)},
)


def _after_one_forward(batch: Batch, state: Array) -> Array:
    """Return the state after one forward at theta, for the weights of the problem."""
    first = carry().layers[0]
    if not isinstance(first, Dense):
        raise TypeError("The problem must start with a dense layer.")
    x = batch.inputs @ first.weight + (0.0 if first.bias is None else first.bias)
    return np.asarray((state + x.mean(axis=0)) / 2)


def _start() -> Array:
    """Return the initial state of the problem's layer."""
    (layer,) = (layer for layer in carry().layers if isinstance(layer, Carry))
    return layer.state


@check("carry")
def check_forwards_write_once(adapter: Adapter) -> None:
    """After a step the state is the same as after one forward at theta on the batch."""
    for case in _CASES:
        esam, state = {"rho": 2.0, "seed": 3, **case}, _start()
        session = Run(problem=carry(), esam=esam, base=Base("sgd", lr=0.0)).on(adapter)
        for i, batch in enumerate(carry().batches[:3]):
            session.step(batch)
            state = _after_one_forward(batch, state)
            close(
                f"{case}, step {i}: carry.state",
                session.buffers().get("carry.state"),
                state,
                kind="buffers",
                dtype=adapter.dtypes[0],
            )


@check("carry")
def check_passes_read_the_same(adapter: Adapter) -> None:
    """Every pass of a step reads the same state as the first, not what the first wrote."""
    for case in _CASES[:3]:
        follow(adapter, Run(problem=carry(), esam={"rho": 0.2, "seed": 3, **case}), steps=3)


@check("carry", "ascend")
def check_forwards_write_once_with_any_direction(adapter: Adapter) -> None:
    """The pass that updates BatchNorm's statistics writes: at theta if one sees the whole batch."""
    for case in _DIRECTIONS:
        follow(adapter, Run(problem=carry(), esam={"rho": 0.2, "beta": 1.0, **case}), steps=3)


@check("carry", "faults")
def check_a_failed_step_writes_nothing(adapter: Adapter) -> None:
    """If a pass raises, nothing is written, and the step can be repeated."""
    problem = carry()
    run = Run(problem=problem, esam={"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3})
    failing, smooth = run.on(adapter), run.on(adapter)
    for i, batch in enumerate(problem.batches[:2]):
        for call in (1, 2, 3):
            fault = Fault(call, InjectedError("in a pass"))
            make_failing_step(adapter, failing, fault, batch, f"step {i}, pass {call}")
        failing.step(batch)
        smooth.step(batch)
        where = f"step {i} repeated after failures"
        equal_all(f"{where}: buffers", failing.buffers(), smooth.buffers())


@check("carry")
def check_a_skipped_step_writes_nothing(adapter: Adapter) -> None:
    """A step that is skipped because a loss is not finite writes nothing."""
    problem = carry()
    esam = {"rho": 0.3, "beta": 1.0, "gamma": 0.5, "on_nonfinite": "skip"}
    session = Run(problem=problem, esam=esam).on(adapter)
    for i, batch in enumerate(problem.batches[:3]):
        session.step(batch)
        before = session.buffers()
        session.step(with_nan(batch, 2))
        equal_all(f"after skipped step {i}: buffers", session.buffers(), before)


CHECKS = (
    check_forwards_write_once,
    check_passes_read_the_same,
    check_forwards_write_once_with_any_direction,
    check_a_failed_step_writes_nothing,
    check_a_skipped_step_writes_nothing,
)
