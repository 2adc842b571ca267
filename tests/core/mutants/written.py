"""Forwards that write too often, too seldom, at the wrong weights, or for the wrong readers."""

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
    """Knows what its forwards have written, each in turn."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Forget the step before."""
        self.written: list[dict[str, Array]] = []
        return super().perturbed_step(batch, mask, entry)

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Take note."""
        evaluation = super().ascent(batch, part)
        self.written.append(self.model.forward_state[1])
        return evaluation

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Take note."""
        result = super().descent(batch, indices, weights)
        self.written.append(self.model.forward_state[1])
        return result

    def carry(self, written: Mapping[str, Array]) -> None:
        """Let what is carried be this."""
        self.model.forward_state = (self.model.forward_state[0], written)


@MUTANTS.caught_by("check_forwards_write_once")
class EveryPassWrites(WatchedNetwork):
    """Each pass writes, and finds what the one before has written."""

    @property
    def forward_state(self) -> Any:
        """The random state alone."""
        return self.random_state, {}

    @forward_state.setter
    def forward_state(self, state: Any) -> None:
        self.random_state = state[0]


@MUTANTS.caught_by("check_forwards_write_once")
class WrittenAtThePeak(_Carrying):
    """What the descent writes stays, at theta + epsilon."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Keep what was written last."""
        result = super().perturbed_step(batch, mask, entry)
        self.carry(self.written[-1])
        return result


@MUTANTS.caught_by("check_forwards_write_once")
class NothingWritten(Step):
    """Everything that forwards write is put back."""

    def backward(self, batch: Any) -> Any:
        """Put it back."""
        _, carried = self.model.forward_state
        result = super().backward(batch)
        self.model.forward_state = (self.model.forward_state[0], carried)
        return result


@MUTANTS.caught_by("check_passes_read_the_same")
class PassesReadWhatTheFirstWrote(_Carrying):
    """Later passes find what the ascent has written: a queue holds the batch's own keys."""

    def selection_pass(self, batch: Any) -> Array:
        """Show it."""
        self.carry(self.written[0])
        return super().selection_pass(batch)

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Show it."""
        self.carry(self.written[0])
        return super().descent(batch, indices, weights)


@MUTANTS.caught_by("check_forwards_write_once_with_any_direction")
class WrittenByThePart(_Carrying):
    """What the part that climbs writes stays, of samples that are not the batch."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Keep what was written first."""
        result = super().perturbed_step(batch, mask, entry)
        self.carry(self.written[0])
        return result


@MUTANTS.caught_by("check_a_failed_step_writes_nothing")
class WritesOfAFailedStepStay(Step):
    """If a pass raises, what the first has written stays."""

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
    """The running statistics are put back after a skipped step, and nothing else."""

    def restore_buffers(self, buffers: Mapping[str, Array]) -> None:
        """Leave the others out."""
        super().restore_buffers({n: a for n, a in buffers.items() if not n.endswith(".state")})
