"""The first forward of a step: what it writes is found, and restored for later passes."""

from torch import Tensor

from esam_core.generators import HostRandomState
from esam_torch.compat import count_writes
from esam_torch.values import State, data_of
from esam_torch.written import Start, Writes

__all__ = ["Forward"]

#: Bytes that may be copied to find writes, if the trained weights are smaller.
_ALLOWANCE = 2**20


class _Watch:
    """Saved values of everything that a forward may write.

    Args:
        writes: records what is found.
    """

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._by_value = writes.compares_values
        self._places, self._candidates = writes.candidates()
        self._marks = [_mark(c.tensor) for c in self._candidates]
        random, norms, kept = HostRandomState(), writes.training_norms(), writes.keep()
        state = State(self._places, self._affordable())
        state = state.join(kept.restarted, kept.statistics, kept.trained)
        self.start = Start(state, norms, random)

    def _affordable(self) -> list[Tensor]:
        """Return the tensors to copy: the smallest, in total not larger than the trained weights.

        Large frozen weights with a small adapter are not copied; an average of the trained weights
        is.
        """
        left = max(_ALLOWANCE, sum(c.tensor.nbytes for c in self._candidates if c.trained))
        chosen: list[Tensor] = []
        seen: set[int] = set()
        for candidate in sorted(self._candidates, key=lambda c: c.tensor.nbytes):
            left -= candidate.tensor.nbytes
            if left < 0:
                break
            if not candidate.trained and id(candidate.tensor) not in seen:
                seen.add(id(candidate.tensor))
                chosen.append(candidate.tensor)
        return chosen

    def compare(self) -> None:
        """Find what was written."""
        written = {
            id(c.tensor)
            for c, mark in zip(self._candidates, self._marks, strict=True)
            if _mark(c.tensor) != mark
        }
        state = self.start.state
        self._writes.draws |= self.start.random.has_moved()
        copied = state.tensors()
        late = written - copied
        self._writes.late |= any(id(c.tensor) in late and not c.trained for c in self._candidates)
        if self._by_value:
            written |= {id(t) for t in state.unlike(without=written)}
        changed = [*state.find_changes(), *self._writes.new_places(self._places)]
        self._writes.learn(changed, [c for c in self._candidates if id(c.tensor) in written])
        self._writes.find_statistics()
        self._writes.set_idle(self._candidates)

    def undo(self) -> None:
        """Restore everything, and delete names that the forward created."""
        for names, name in self._writes.new_places(self._places):
            del names[name]
        self.start.state.restore()
        self.start.random.restore()


class Forward:
    """The state before a step's first forward, which later passes and errors restore.

    Args:
        writes: finds and copies what is written.

    Attributes:
        watched: whether everything is checked in this step.
    """

    def __init__(self, writes: Writes) -> None:
        self.watched = writes.watches
        self._writes = writes
        self._training = writes.training
        self._watch = _Watch(writes) if self.watched else None
        self._start = None if self.watched else writes.keep()
        self._versions = {} if self.watched else writes.versions()
        self._late: State | None = None
        self._noted = False

    def note(self) -> None:
        """Record what the forward has written; called once, after it."""
        if self._noted:
            return
        self._noted = True
        self._writes.count_forward(training=self._training)
        if self._watch is not None:
            self._watch.compare()
            self._start = self._writes.keep(self._watch.start)
            self._watch = None
        else:
            late = self._writes.learn_versions(self._versions)
            self._late = State((), late) if late else None

    def rewind(self) -> None:
        """Restore the values that the next pass reads."""
        if self._start is not None:
            self._start.restart()
        if self._late is not None:
            self._late.restore()

    def undo(self, *, generators: bool = True) -> None:
        """Restore everything that the forward may have written, with or without generators."""
        random = None if generators else HostRandomState()
        if self._watch is not None:
            self._watch.undo()
        if self._start is not None:
            self._start.restore()
        if random is not None:
            random.restore()


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return a mark that changes if a tensor is written in place or its `.data` is replaced."""
    return count_writes(tensor), data_of(tensor).data_ptr()
