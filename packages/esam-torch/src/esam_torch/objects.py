"""What a pass may set: attributes of the user's objects in a batch, and variables of `losses`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from esam_torch.batch import Batch
from esam_torch.containers import own_objects_inside, tensors_inside
from esam_torch.values import Place, State, is_plain
from esam_torch.variables import assigned_places

__all__ = ["Objects", "arrays_of"]


class Objects:
    """The attributes of a batch's objects when a step begins, which each of its passes reads.

    Such objects cannot be copied in general, so their attributes are set. After a step they are as
    after its first pass. The same holds for variables that `losses` assigns itself.

    Args:
        batch: arguments of `losses`.
        losses: the user's function.
    """

    def __init__(self, batch: Batch, losses: Any) -> None:
        args, kwargs = batch
        self._objects = list(own_objects_inside((*args, *kwargs.values())))
        self._assigned = assigned_places(losses)
        self._start = State(self._places(), ())

    def rewinding(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the attributes are as at the beginning."""
        return self._rewinding() if self._objects or self._assigned else contextlib.nullcontext()

    def undoing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context whose changes of attributes, and of tensors in them, are undone."""
        return self._undoing() if self._objects or self._assigned else contextlib.nullcontext()

    @contextlib.contextmanager
    def _rewinding(self) -> Iterator[None]:
        now = State(self._places(), ())
        try:
            self._set(self._start)
            yield
        finally:
            self._set(now)

    @contextlib.contextmanager
    def _undoing(self) -> Iterator[None]:
        tensors = [t for x in self._objects for t in tensors_inside(x) if is_plain(t)]
        now = State(self._places(), tensors)
        arrays = [(a, a.copy()) for x in self._objects for a in arrays_of(x)]
        try:
            yield
        finally:
            self._set(now)
            for array, copy in arrays:
                array[...] = copy

    def _places(self) -> list[Place]:
        """Return the places of all attributes that the objects have now, and of the variables."""
        own: list[dict[str, Any]] = [vars(x) for x in self._objects]
        return [*((names, name) for names in own for name in names), *self._assigned]

    def _set(self, state: State) -> None:
        """Restore a state of the attributes, without those that were not there."""
        state.part(self._places(), ()).restore()
        state.restore()


def arrays_of(x: Any) -> list[Any]:
    """Return the NumPy arrays that are attributes of an object."""
    return [value for value in vars(x).values() if isinstance(value, np.ndarray)]
