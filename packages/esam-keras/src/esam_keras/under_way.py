"""A step inside a model's own `train_step`, which is drawn before it and reported after it.

A `train_step` has only Keras's arguments; the drawn step is kept for it in a context variable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from esam_core import ESAMValueError
from esam_keras.backends.base import ModelTraining
from esam_keras.prepared import first_axis
from esam_keras.routes import check_row_counts

__all__ = ["UnderWay", "step_under_way", "under_way"]


@dataclass
class UnderWay:
    """A drawn step that has not run yet.

    Args:
        training: ESAM's part of the model.
        run: the step: a function of the arguments of `train_step`. It returns what `train_step`
            does, and arrays for the report.
        rows: the number of samples for which it was drawn.
        report: after the step, arrays for its report.
    """

    training: ModelTraining
    run: Callable[..., tuple[Any, dict[str, Any] | None]]
    rows: int | None
    report: dict[str, Any] | None = field(default=None)

    def make(self, *arguments: Any) -> Any:
        """Run the step; return the result of `train_step`.

        Raises:
            ESAMValueError: the batch does not have the size for which the step was drawn.
        """
        rows = first_axis(arguments[-1])
        if rows != self.rows:
            raise ESAMValueError(
                "Your own `train_step` must not change the number of samples: masks and "
                f"selections are drawn before it. Received: {rows} samples instead of {self.rows}."
            )
        if self.training.prepared.takes_rows:
            check_row_counts(arguments[-1])
        found, self.report = self.run(*arguments)
        return found


_STEP: ContextVar[UnderWay | None] = ContextVar("_STEP", default=None)


def step_under_way(training: ModelTraining) -> UnderWay | None:
    """Return the step of a model whose `train_step` runs now; None if there is none."""
    step = _STEP.get()
    return step if step is not None and step.training is training else None


@contextmanager
def under_way(step: UnderWay) -> Iterator[UnderWay]:
    """Let the `train_step` inside the context run a drawn step."""
    before = _STEP.set(step)
    try:
        yield step
    finally:
        _STEP.reset(before)
