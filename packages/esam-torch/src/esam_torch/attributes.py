"""Attributes, buffers, submodules and hooks, which the user may replace between a step's passes."""

import contextlib
from collections.abc import Iterator

from torch import nn

from esam_torch.compat import (
    HOOKS,
    LIGHTNINGS_HOOK,
    MODULE_ATTRIBUTES,
    SUBMODULES,
    buffers_by_name,
)
from esam_torch.values import Place, PlaceKey, State, key_of, places_without
from esam_torch.wrappers import bare_model
from esam_torch.written import Writes

__all__ = ["Attributes", "KeptAttributes"]

#: Attributes that are not the user's.
_OTHERS = MODULE_ATTRIBUTES - HOOKS - {SUBMODULES} | {LIGHTNINGS_HOOK}


class Attributes:
    """Finds which attributes of modules change between a loss and its backward.

    In the steps in which `Writes` checks everything, all are compared: the attributes that are not
    parameters, with the contents of containers. The other steps compare only those that have been
    seen to change.

    Args:
        model: the model that `losses` calls; wrappers are unwrapped.
        writes: tracks what forwards write. Each pass reads this as at the start of the step.
    """

    def __init__(self, model: nn.Module, writes: Writes) -> None:
        self._modules = list(bare_model(model).modules())
        self._writes = writes
        self._known: dict[PlaceKey, Place] = {}

    def keep(self, *, watched: bool) -> "KeptAttributes":
        """Return the attributes as they are now; all of them if the step is watched."""
        return KeptAttributes(self, watched=watched)

    def places(self, *, watched: bool) -> list[Place]:
        """Return the places to compare."""
        if not watched:
            return list(self._known.values())
        return [
            (names, name)
            for module in self._modules
            for names in (vars(module), buffers_by_name(module))
            for name in names
            if name not in _OTHERS
        ]

    def learn(self, changed: list[Place]) -> list[Place]:
        """Record places that have changed, and return those that no forward writes."""
        found = [place for place in changed if not self._writes.writes(place)]
        self._known.update({key_of(place): place for place in found})
        return found


class KeptAttributes:
    """The attributes after the first pass of a step, for its later passes."""

    def __init__(self, attributes: Attributes, *, watched: bool) -> None:
        self._attributes = attributes
        self._watched = watched
        self._places = attributes.places(watched=watched)
        self._state = State(self._places, ())

    def restoring(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the attributes as they were."""
        changed = self._state.find_changes()
        if self._watched:
            changed += places_without(self._attributes.places(watched=True), self._places)
        changed = self._attributes.learn(changed)
        return self._restoring(changed) if changed else contextlib.nullcontext()

    @contextlib.contextmanager
    def _restoring(self, changed: list[Place]) -> Iterator[None]:
        """Use the kept attributes inside the context."""
        now = State(changed, ())
        try:
            self._state.part(changed, ()).restore()
            yield
        finally:
            now.restore()
