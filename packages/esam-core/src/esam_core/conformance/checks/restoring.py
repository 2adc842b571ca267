"""Weights are always restored bit for bit."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter, Fault, Session
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import (
    ConformanceError,
    equal,
    equal_all,
    has_nonfinite,
    require,
)
from esam_core.conformance.problems import PEAK_RHO, batchnorm, dropout, mlp, peak, with_nan
from esam_core.conformance.trace import Run, compare_state, same_state, shows
from esam_core.problem import Base, Batch, Dense, Problem, Tanh
from esam_core.samplers import Bernoulli
from esam_core.schedules import Every
from esam_core.selectors import Proportional, Random, TopIncrease, random_indices

__all__ = ["CHECKS", "InjectedError", "make_failing_step", "require_nonfinite"]


class InjectedError(Exception):
    """The error of a fault, which no backend raises itself."""


class InjectedInterrupt(BaseException):
    """The interrupt of a fault, instead of a KeyboardInterrupt."""


def _uneven_problem(problem: Problem) -> Problem:
    """Return the problem with weights that use all their bits, so that rounding is visible."""
    layers = tuple(
        replace(layer, weight=layer.weight / 3.0) if isinstance(layer, Dense) else layer
        for layer in problem.layers
    )
    return replace(problem, layers=layers)


@check()
def check_weights_come_back_bit_for_bit(adapter: Adapter) -> None:
    """At lr = 0, twenty steps do not change any bit of the weights."""
    for dtype in adapter.dtypes:
        for problem in (_uneven_problem(mlp()), _uneven_problem(batchnorm())):
            run = Run(
                problem=problem,
                esam={"rho": 0.7, "beta": 0.6, "gamma": 0.5},
                base=Base("sgd", lr=0.0),
            )
            session = run.on(adapter, dtype)
            before = session.weights()
            for i in range(20):
                session.step(problem.batches[i % len(problem.batches)])
            equal_all(f"{dtype}: weights after 20 steps at lr = 0", session.weights(), before)


@check("faults")
def check_a_failed_step_leaves_no_trace(adapter: Adapter) -> None:
    """If a pass raises, everything is restored, and the step can be repeated.

    In each of the three passes, for an error and for an interrupt: weights, running statistics,
    flags and random state are as before, and the exception is passed on unchanged.
    """
    errors: tuple[BaseException, ...] = (InjectedError("in a pass"), InjectedInterrupt())
    for problem in (batchnorm(), dropout()):
        if problem.name == "dropout" and not shows(adapter, "dropout"):
            continue
        run = Run(problem=problem, esam={"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3})
        failing, smooth = run.on(adapter), run.on(adapter)
        for i, batch in enumerate(problem.batches[:2]):
            for call in (1, 2, 3):
                for error in errors:
                    make_failing_step(
                        adapter, failing, Fault(call, error), batch, f"step {i}, pass {call}"
                    )
            shown, wanted = failing.step(batch), smooth.step(batch)
            if shows(adapter, "perturbed"):
                equal(f"step {i} repeated: perturbed", shown.perturbed, wanted.perturbed)
            same_state(f"step {i} repeated after failures", failing, smooth, adapter.dtypes[0])


def make_failing_step(
    adapter: Adapter, session: Session, fault: Fault, batch: Any, where: str
) -> None:
    """Run a step that must fail, and require that everything is as before."""
    weights, buffers = session.weights(), session.buffers()
    flags = session.trainable() if shows(adapter, "frozen") else {}
    probe = np.asarray(session.random_probe()) if shows(adapter, "random") else None
    raised: BaseException | None = None
    try:
        session.step(batch, fault)
    except BaseException as error:  # the type is checked below
        raised = error
    require(
        raised is fault.error,
        f"{where}: expected {fault.error!r}, got {raised!r}.",
    )
    equal_all(f"{where} raised: weights", session.weights(), weights)
    equal_all(f"{where} raised: buffers", session.buffers(), buffers)
    if flags:
        equal(f"{where} raised: trainable", session.trainable() == flags, True)
    if probe is not None:
        equal(f"{where} raised: random state", np.asarray(session.random_probe()), probe)


def _overflowing(dtype: str) -> float:
    """Return a radius with which all weights of the dtype overflow."""
    return 1e39 if dtype == "float32" else 1e308


@check()
def check_overflow_at_the_peak(adapter: Adapter) -> None:
    """If the perturbed losses overflow and such steps are skipped, weights do not change."""
    for dtype in adapter.dtypes:
        problem = mlp()
        run = Run(
            problem=problem,
            esam={
                "rho": _overflowing(dtype),
                "beta": 0.5,
                "gamma": 0.5,
                "seed": 3,
                "on_nonfinite": "skip",
            },
        )
        session = run.on(adapter, dtype)
        before = session.weights()
        session.step(problem.batches[0])
        equal_all(f"{dtype}: weights after an overflow", session.weights(), before)


def _bad_batch(count: int) -> tuple[Any, int]:
    """Return a batch with a NaN in a sample that `Random(0.5)`, seed 9, does not select."""
    batch = mlp().batches[0]
    chosen = set(random_indices(8, 4, seed=9, count=count).tolist())
    sample = next(i for i in range(8) if i not in chosen)
    return with_nan(batch, sample), sample


@check()
def check_nonfinite_values_propagate(adapter: Adapter) -> None:
    """By default a NaN reaches every gradient, even from a rejected sample.

    Otherwise a gradient scaler would not detect it, and only some ranks would skip the step.
    """
    cases = (
        *((Random(0.5), "masked"), (TopIncrease(0.5), "masked"), (TopIncrease(1.0), "masked")),
        (Random(0.5), "none"),
    )
    for select, norm in cases:
        esam = {"rho": 0.3, "beta": 1.0, "select": select, "norm": norm, "seed": 9}
        session = Run(problem=mlp(), esam=esam).on(adapter)
        batch, sample = _bad_batch(0)
        shown = session.step(batch)
        require_nonfinite(f"{select}: sample {sample} is NaN", session.weights())
        if shows(adapter, "perturbation_norm"):
            equal(
                f"{select}, norm={norm!r}: perturbation_norm of a non-finite ascent",
                shown.perturbation_norm,
                0.0,
            )


@check()
def check_overflows_propagate(adapter: Adapter) -> None:
    """By default an overflow reaches every gradient, also where the losses before it are finite.

    The gradient of one sample overflows, whose loss is finite; then the perturbed loss of one
    sample, which is not drawn in each step.
    """
    for dtype in adapter.dtypes:
        large = 1e25 if dtype == "float32" else 1e200  # its square overflows
        head = np.array([[1.0, -1.0], [1.0, -1.0]]) * large
        layers = (Dense("first", np.zeros((1, 2))), Tanh("tanh"), Dense("head", head))
        steep = Batch(np.array([[1.0], [1.0], [1.0], [large]]), np.array([0, 1, 0, 1]))
        run = Run(problem=Problem("steep", layers, (steep,)), esam={"beta": 1.0, "gamma": 0.5})
        session = run.on(adapter, dtype)
        session.step(steep)
        require_nonfinite(f"{dtype}: an ascent gradient overflows", session.weights())
        for seed in range(4):
            esam = {
                "rho": PEAK_RHO[dtype],
                "beta": 1.0,
                "select": Proportional(0.5, score="increase"),
                "seed": seed,
            }
            session = Run(problem=peak(), esam=esam).on(adapter, dtype)
            session.step(peak().batches[0])
            where = f"{dtype}, seed {seed}: a perturbed loss overflows"
            require_nonfinite(where, session.weights())


def require_nonfinite(where: str, arrays: Mapping[str, Any]) -> None:
    """Require that no array, of gradients or updated weights, is finite."""
    spared = [name for name, bad in has_nonfinite(arrays).items() if not bad]
    require(not spared, f"{where}, and {spared} are finite: it was hidden.")


@check("backward")
def check_nonfinite_values_leave_theta_alone(adapter: Adapter) -> None:
    """After a non-finite ascent theta is intact and the gradients are not finite."""
    session = Run(problem=mlp(), esam={"rho": 0.3, "beta": 1.0, "gamma": 0.5}).on(adapter)
    before = session.weights()
    session.zero_gradients()
    session.backward(_bad_batch(0)[0])
    equal_all("weights after a non-finite backward", session.weights(), before)
    require_nonfinite("gradients after a loss that is NaN", session.gradients())


def steps_beside_reference(adapter: Adapter, esam: Mapping[str, Any], problem: Problem) -> None:
    """Run a good, a bad and two good steps on both sides; the bad one must have no effect."""
    dtype = adapter.dtypes[0]
    run = Run(problem=problem, esam=esam)
    actual, expected = run.on(adapter), run.on_reference(adapter)
    good = problem.batches
    for i, batch in enumerate((good[0], with_nan(good[1], 2), good[2], good[3])):
        weights, buffers = actual.weights(), actual.buffers()
        raised = _raises_nonfinite(actual, batch)
        equal(f"step {i}: raises", raised, _raises_nonfinite(expected, batch))
        if i == 1:
            equal_all("weights after a non-finite step", actual.weights(), weights)
            equal_all("buffers after a non-finite step", actual.buffers(), buffers)
        compare_state(f"step {i}", actual, expected, dtype)


def _raises_nonfinite(session: Session, batch: Any) -> bool:
    """Run a step; return whether it raised the error of `on_nonfinite="raise"`."""
    try:
        session.step(batch)
    except FloatingPointError:
        return True
    except Exception as error:
        raise ConformanceError(
            f"a non-finite loss: expected a FloatingPointError, got {error!r}."
        ) from error
    return False


@check()
def check_nonfinite_steps_are_skipped(adapter: Adapter) -> None:
    """`on_nonfinite="skip"`: a skipped step changes no weights, momenta or running statistics.

    The second step is skipped: one that perturbs, and a base step.
    """
    for perturb in (Bernoulli(0.5), Every(2)):
        esam = {"rho": 0.3, "perturb": perturb, "gamma": 0.5, "seed": 3, "on_nonfinite": "skip"}
        steps_beside_reference(adapter, esam, batchnorm())


@check("backward")
def check_a_skipped_backward_keeps_the_gradients(adapter: Adapter) -> None:
    """`on_nonfinite="skip"`: the gradients of earlier micro-batches stay as they are."""
    esam = {"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3, "on_nonfinite": "skip"}
    session = Run(problem=mlp(), esam=esam).on(adapter)
    session.zero_gradients()
    session.backward(mlp().batches[0])
    before = session.gradients()
    session.backward(with_nan(mlp().batches[1], 2))
    equal_all("gradients after a skipped backward", session.gradients(), before)


@check()
def check_nonfinite_steps_raise(adapter: Adapter) -> None:
    """`on_nonfinite="raise"`: a FloatingPointError, and everything is restored."""
    for perturb in (Every(2), Bernoulli(0.5)):
        esam = {"rho": 0.3, "perturb": perturb, "gamma": 0.5, "seed": 3, "on_nonfinite": "raise"}
        steps_beside_reference(adapter, esam, batchnorm())
    if shows(adapter, "dropout") and shows(adapter, "random"):
        session = Run(problem=dropout(), esam=esam).on(adapter)
        before = np.asarray(session.random_probe())
        _raises_nonfinite(session, with_nan(dropout().batches[0], 2))
        after = np.asarray(session.random_probe())
        equal("random state after a step that raised", after, before)


CHECKS = (
    check_weights_come_back_bit_for_bit,
    check_a_failed_step_leaves_no_trace,
    check_overflow_at_the_peak,
    check_nonfinite_values_propagate,
    check_overflows_propagate,
    check_nonfinite_values_leave_theta_alone,
    check_nonfinite_steps_are_skipped,
    check_a_skipped_backward_keeps_the_gradients,
    check_nonfinite_steps_raise,
)
