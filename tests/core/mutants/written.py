"""Forwards that write too often, too rarely, at the wrong weights, or for the wrong passes."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.conformance.numpy_adapter import WatchedNetwork
from esam_core.reference.network import Evaluation
from esam_core.reference.step import Step
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


class _Carrying(Step):
    """Records what each of its forwards writes."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Forget the previous step."""
        self.written: list[dict[str, Array]] = []
        return super().perturbed_step(batch, mask, entry)

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Record what was written."""
        evaluation = super().ascent(batch, part)
        self.written.append(self.model.forward_state[1])
        return evaluation

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Record what was written."""
        result = super().descent(batch, indices, weights)
        self.written.append(self.model.forward_state[1])
        return result

    def carry(self, written: Mapping[str, Array]) -> None:
        """Set the carried state."""
        self.model.forward_state = (self.model.forward_state[0], written)


@MUTANTS.caught_by("check_forwards_write_once")
class EveryPassWrites(WatchedNetwork):
    """Each pass writes, and reads what the previous one wrote."""

    @property
    def forward_state(self) -> Any:
        """Only the random state."""
        return self.random_state, {}

    @forward_state.setter
    def forward_state(self, state: Any) -> None:
        self.random_state = state[0]


@MUTANTS.caught_by("check_forwards_write_once")
class WrittenAtThePeak(_Carrying):
    """The state that the descent pass writes, at theta + epsilon, is kept."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Keep the last written state."""
        result = super().perturbed_step(batch, mask, entry)
        self.carry(self.written[-1])
        return result


@MUTANTS.caught_by("check_forwards_write_once")
class NothingWritten(Step):
    """Everything that forwards write is restored."""

    def backward(self, batch: Any) -> Any:
        """Restore the state."""
        _, carried = self.model.forward_state
        result = super().backward(batch)
        self.model.forward_state = (self.model.forward_state[0], carried)
        return result


@MUTANTS.caught_by("check_passes_read_the_same")
class PassesReadWhatTheFirstWrote(_Carrying):
    """Later passes read what the ascent pass wrote: a queue contains the batch's own keys."""

    def selection_pass(self, batch: Any) -> Array:
        """Show the written state."""
        self.carry(self.written[0])
        return super().selection_pass(batch)

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Show the written state."""
        self.carry(self.written[0])
        return super().descent(batch, indices, weights)


@MUTANTS.caught_by("check_forwards_write_once_with_any_direction")
class WrittenByThePart(_Carrying):
    """The state that the ascent pass on a part writes is kept."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Keep the first written state."""
        result = super().perturbed_step(batch, mask, entry)
        self.carry(self.written[0])
        return result


@MUTANTS.caught_by("check_a_failed_step_writes_nothing")
class WritesOfAFailedStepStay(Step):
    """If a pass raises, the state that the first pass wrote is kept."""

    def backward(self, batch: Any) -> Any:
        """Write it again."""
        try:
            return super().backward(batch)
        except BaseException:
            random, _ = self.model.forward_state
            self.model.evaluate(batch, statistics="batch", update=False)
            self.model.forward_state = (random, {})
            raise


@MUTANTS.caught_by("check_a_skipped_step_writes_nothing")
class WritesOfASkippedStepStay(Step):
    """After a skipped step only the running statistics are restored."""

    def restore_buffers(self, buffers: Mapping[str, Array]) -> None:
        """Leave out the other state."""
        super().restore_buffers({n: a for n, a in buffers.items() if not n.endswith(".state")})
