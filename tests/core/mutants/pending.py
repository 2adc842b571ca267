"""Wrong steps between updates: gradients of several backwards, and pending ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.conformance.numpy_adapter import NumpySession
from esam_core.reference.step import Step
from esam_core.selectors import Selection

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


@contextmanager
def _count_of_the_update(step: Step) -> Iterator[None]:
    """Use the count of the first of three backwards inside the context."""
    count, step.count = step.count, step.count - step.count % 3
    try:
        yield
    finally:
        step.count = count


@MUTANTS.caught_by("check_each_backward_draws_its_own_samples")
class SelectionOncePerUpdate(Step):
    """`Random` selects the same positions in all backwards of an update."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Draw for the first of three backwards."""
        with _count_of_the_update(self):
            return super().selection(losses, perturbed_losses)


@MUTANTS.caught_by("check_each_backward_draws_its_own_samples")
class PartOncePerUpdate(Step):
    """`Part` draws the same samples in all backwards of an update."""

    def ascent_indices(self, b: int) -> Array:
        """Draw for the first of three backwards."""
        with _count_of_the_update(self):
            return super().ascent_indices(b)


@MUTANTS.caught_by("check_step_refuses_pending_gradients")
class PendingAfterUpdate(NumpySession):
    """`step` refuses even after the update."""

    def apply(self) -> None:
        """Keep the flag."""
        pending = self.pending
        super().apply()
        self.pending = pending


@MUTANTS.caught_by("check_step_refuses_pending_gradients")
class PendingAfterZeroing(NumpySession):
    """`step` refuses even after `zero_gradients`."""

    def zero_gradients(self) -> None:
        """Keep the flag."""
        self.left = {}
