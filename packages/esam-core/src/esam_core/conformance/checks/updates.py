"""The gradients for the base optimizer, and its updates."""

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close_all, equal, equal_all, require
from esam_core.conformance.problems import batchnorm, mlp
from esam_core.conformance.trace import Run, compare_state, follow, resume, shows
from esam_core.directions import Part
from esam_core.problem import Base
from esam_core.selectors import Random

__all__ = ["CHECKS"]

_ESAM = {"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3}


@check()
def check_base_optimizers(adapter: Adapter) -> None:
    """The base optimizer's update runs once: SGD's variants, Adam, AdamW."""
    bases = (
        (Base("sgd", lr=0.1), "weights"),
        (Base("sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01), "weights"),
        (Base("adam", lr=0.01), "adaptive weights"),
        (Base("adamw", lr=0.01, weight_decay=0.1), "adaptive weights"),
    )
    for base, kind in bases:
        follow(adapter, Run(problem=mlp(), esam=_ESAM, base=base), steps=4, kind=kind)


@check()
def check_paper_settings(adapter: Adapter) -> None:
    """The paper's step (beta = .6, gamma = .5) over six steps, in every dtype of the backend."""
    for dtype in adapter.dtypes:
        run = Run(problem=mlp(), esam={"rho": 0.1, "beta": 0.6, "gamma": 0.5})
        follow(adapter, run, steps=6, dtype=dtype)


@check("backward")
def check_backward_adds_the_descent_gradient(adapter: Adapter) -> None:
    """`backward` adds only the descent gradient to the existing gradients."""
    dtype, problem = adapter.dtypes[0], mlp()
    run = Run(problem=problem, esam=_ESAM)
    actual, expected = run.on(adapter), run.on_reference(adapter)
    before = actual.weights()
    for session in (actual, expected):
        session.zero_gradients()
    for i, batch in enumerate(problem.batches[:3]):
        shown, wanted = actual.backward(batch), expected.backward(batch)
        if shows(adapter, "gradient_norm"):
            close_all(
                f"micro-batch {i}",
                {"gradient_norm": float(shown.gradient_norm or 0.0)},
                {"gradient_norm": float(wanted.gradient_norm or 0.0)},
                kind="norms",
                dtype=dtype,
            )
        equal_all(f"micro-batch {i}: weights", actual.weights(), before)
        close_all(
            f"gradients after {i + 1} micro-batches",
            actual.gradients(),
            expected.gradients(),
            kind="gradient",
            dtype=dtype,
        )
    for session in (actual, expected):
        session.apply()
    compare_state("after the update", actual, expected, dtype)


@check("backward", "indices")
def check_each_backward_draws_its_own_samples(adapter: Adapter) -> None:
    """Each `backward` has its own count, also without an update: `Random` and `Part` draw again."""
    ascend = {"ascend": Part(0.25)} if shows(adapter, "ascend") else {}
    esam = {"rho": 0.3, "beta": 0.5, "select": Random(0.5), "seed": 3, **ascend}
    run = Run(problem=mlp(), esam=esam)
    actual, expected = run.on(adapter), run.on_reference(adapter)
    for session in (actual, expected):
        session.zero_gradients()
    for i, batch in enumerate(run.problem.batches[:3]):
        shown, wanted = actual.backward(batch), expected.backward(batch)
        equal(f"micro-batch {i}: indices", shown.indices, wanted.indices)
        if ascend:
            equal(f"micro-batch {i}: part", shown.part, wanted.part)


@check("backward")
def check_step_refuses_pending_gradients(adapter: Adapter) -> None:
    """A whole `step` zeroes gradients, so it raises if gradients of a `backward` are pending.

    They are until an update, or until they are zeroed.
    """
    problem = mlp()
    session = Run(problem=problem, esam=_ESAM).on(adapter)
    session.zero_gradients()
    session.backward(problem.batches[0])
    weights, gradients = session.weights(), session.gradients()
    refused = False
    try:
        session.step(problem.batches[1])
    except RuntimeError:
        refused = True
    require(refused, "step with a batch after a backward: expected a RuntimeError, got none.")
    equal_all("weights after the refusal", session.weights(), weights)
    equal_all("gradients after the refusal", session.gradients(), gradients)
    for name, settle in (("apply", session.apply), ("zero_gradients", session.zero_gradients)):
        settle()
        raised: Exception | None = None
        try:
            session.step(problem.batches[1])
        except RuntimeError as error:
            raised = error
        require(raised is None, f"step with a batch after {name}: expected none, got {raised!r}.")
        session.backward(problem.batches[0])


@check("state")
def check_resuming(adapter: Adapter) -> None:
    """A saved and loaded run resumes exactly: masks, momenta and statistics."""
    adamw = Base("adamw", lr=0.01, weight_decay=0.1)
    resume(adapter, Run(problem=batchnorm(), esam=_ESAM, base=adamw, seed=2))


CHECKS = (
    check_base_optimizers,
    check_paper_settings,
    check_backward_adds_the_descent_gradient,
    check_each_backward_draws_its_own_samples,
    check_step_refuses_pending_gradients,
    check_resuming,
)
