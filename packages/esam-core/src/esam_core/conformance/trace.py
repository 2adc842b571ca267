"""A run of the backend, compared with a run of the reference after every step."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esam_core.conformance.adapter import Adapter, Observed, Session
from esam_core.conformance.compare import close, close_all, equal, require
from esam_core.conformance.numpy_adapter import NumpyAdapter
from esam_core.problem import Base, Batch, Problem

__all__ = [
    "SGD",
    "Run",
    "compare_observed",
    "compare_state",
    "follow",
    "resume",
    "same_state",
    "shows",
]

#: The base optimizer of most checks: a wrong momentum buffer is visible in the second step.
SGD = Base("sgd", lr=0.1, momentum=0.9)


def shows(adapter: Adapter, capability: str) -> bool:
    """Return whether a backend has a capability, so that it declares no gap for it."""
    return capability not in adapter.gaps


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run: all arguments of `Adapter.session`."""

    problem: Problem
    esam: Mapping[str, Any] | None
    base: Base = SGD
    frozen: Collection[str] = ()
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def on(self, adapter: Adapter, dtype: str | None = None) -> Session:
        """Return this run on a backend, by default in its first dtype."""
        session = adapter.session(
            self.problem,
            self.base,
            self.esam,
            dtype=dtype or adapter.dtypes[0],
            frozen=self.frozen,
            groups=self.groups,
            seed=self.seed,
        )
        require(session is not None, "session: expected a session, got None.")
        return session

    def on_reference(self, adapter: Adapter) -> Session:
        """Return this run on the float64 reference with a backend's conventions."""
        return self.on(NumpyAdapter(adapter.conventions), "float64")


def compare_observed(
    adapter: Adapter,
    where: str,
    actual: Observed,
    expected: Observed,
    dtype: str,
    *,
    gradient: bool = True,
) -> None:
    """Require that all observations of a step are as expected.

    Args:
        adapter: the backend.
        where: the start of the message of a failure.
        actual: the backend's observations.
        expected: the reference's observations, or a recording of them.
        dtype: the dtype of the backend's session.
        gradient: whether to compare the gradient too, which recordings do not have.
    """
    # Exact values first: with another mask or selection all numbers differ.
    for name in ("perturbed", "part", "indices", "passes"):
        if shows(adapter, "ascend" if name == "part" else name):
            equal(f"{where}: {name}", getattr(actual, name), getattr(expected, name))
    kinds = {
        "losses": "losses",
        "perturbed_losses": "losses",
        "sample_weights": "sample weights",
        "gradient_norm": "norms",
        "perturbation_norm": "norms",
    }
    for name, kind in kinds.items():
        if not shows(adapter, name):
            continue
        found, wanted = getattr(actual, name), getattr(expected, name)
        if wanted is None:
            equal(f"{where}: {name}", found, None)
        else:
            close(f"{where}: {name}", found, wanted, kind=kind, dtype=dtype)
    if gradient and shows(adapter, "gradient"):
        require(actual.gradient is not None, f"{where}: gradient: expected arrays, got None.")
        close_all(
            f"{where}: gradient",
            actual.gradient or {},
            expected.gradient or {},
            kind="gradient",
            dtype=dtype,
        )


def compare_state(
    where: str, actual: Session, expected: Session, dtype: str, kind: str = "weights"
) -> None:
    """Require that weights and written states match the reference."""
    close_all(f"{where}: weights", actual.weights(), expected.weights(), kind=kind, dtype=dtype)
    close_all(
        f"{where}: buffers", actual.buffers(), expected.buffers(), kind="buffers", dtype=dtype
    )


def same_state(where: str, actual: Session, expected: Session, dtype: str) -> None:
    """Require that two sessions of a backend have the same weights and written states.

    Args:
        where: the start of the message of a failure.
        actual: one session.
        expected: the other.
        dtype: the dtype of both.
    """
    for what in ("weights", "buffers"):
        found, wanted = getattr(actual, what)(), getattr(expected, what)()
        close_all(f"{where}: {what}", found, wanted, kind="same", dtype=dtype)


def follow(
    adapter: Adapter,
    run: Run,
    *,
    steps: int = 3,
    dtype: str | None = None,
    kind: str = "weights",
    batches: Sequence[Batch] | None = None,
) -> tuple[Session, Session]:
    """Step a backend and the reference together; require that all observations agree.

    Args:
        adapter: the backend.
        run: the run.
        steps: the number of steps.
        dtype: the dtype of the backend's session; default: its first.
        kind: the row of the tolerance table for the weights.
        batches: the batches; default: those of the problem.

    Returns:
        The backend's session and the reference's, after the last step.
    """
    dtype = dtype or adapter.dtypes[0]
    actual, expected = run.on(adapter, dtype), run.on_reference(adapter)
    chosen = batches or run.problem.batches
    for i in range(steps):
        batch = chosen[i % len(chosen)]
        where = f"{run.problem.name}, {call_text(run.esam)}, step {i}"
        shown, wanted = actual.step(batch), expected.step(batch)
        compare_observed(adapter, where, shown, wanted, dtype)
        compare_state(where, actual, expected, dtype, kind)
    return actual, expected


def resume(adapter: Adapter, run: Run) -> None:
    """Require that a run, saved after two steps and loaded in a new session, resumes exactly.

    Args:
        adapter: the backend.
        run: the run; its problem has at least four batches.
    """
    batches = run.problem.batches
    whole, first = run.on(adapter), run.on(adapter)
    for batch in batches[:2]:
        whole.step(batch)
        first.step(batch)
    saved: Any = first.state()
    first.step(batches[2])  # a saved state must not change later
    second = run.on(adapter)
    second.load(saved)
    for i, batch in enumerate(batches[2:4]):
        where = f"{call_text(run.esam)}, step {i} after resuming"
        shown, wanted = second.step(batch), whole.step(batch)
        if shows(adapter, "perturbed"):
            equal(f"{where}: perturbed", shown.perturbed, wanted.perturbed)
        same_state(where, second, whole, adapter.dtypes[0])


def call_text(esam: Mapping[str, Any] | None) -> str:
    """Return hyperparameters as in a Python call."""
    if esam is None:
        return "base optimizer"
    return ", ".join(f"{name}={value!r}" for name, value in esam.items())
