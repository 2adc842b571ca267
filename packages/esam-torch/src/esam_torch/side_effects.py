"""What a block changes beside its output: losses it lays aside, counters, buffers, generators.

A block with side effects must be run wherever the script runs it; one without may be given again.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["SideEffects", "hooked_backwards", "hooked_within"]

#: Containers whose items are looked at as well.
_CONTAINERS = (list, tuple, set, dict, deque)


#: What is compared by value: a number set anew is no change if it is the same number.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class SideEffects:
    """Knows which blocks have been seen to change anything in the model.

    A block is looked at the first time it runs before the cut, and afterwards in every step if
    it changed anything then: a cache may be filled once, a loss is laid aside each time.

    Args:
        model: all that is looked at. What a block writes elsewhere (a list in a closure, a file,
            Python's or NumPy's random state) is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._innocent: set[int] = set()
        self._guilty: set[int] = set()

    def before(self, place: int) -> "_State | None":
        """Return what to compare with behind a block, or None if that is known to be needless."""
        return None if place in self._innocent else _State(self._modules)

    def found(self, place: int, before: "_State | None") -> bool:
        """Say whether a block changed anything since `before`."""
        if before is None:
            return False
        changed = before != _State(self._modules)
        if changed:
            self._guilty.add(place)
        elif place not in self._guilty:
            self._innocent.add(place)
        return changed


class _State:
    """Everything that modules hold, and how often tensors were written to."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._held: list[Any] = []  # kept alive, so that an identity is not used twice
        self._marks: list[Any] = []
        for module in modules:
            # Running statistics do not change what a layer gives in training.
            written = not isinstance(module, _NormBase)
            for value in module.__dict__.values():
                if isinstance(value, _CONTAINERS):
                    self._marks.append((type(value), len(value)))
                for item in _items(value):
                    self._note(item, written=written)

    def _note(self, item: Any, *, written: bool) -> None:
        if isinstance(item, _PLAIN):
            self._marks.append(item)
            return
        self._held.append(item)
        self._marks.append(id(item))
        if isinstance(item, Tensor) and written and not item.is_inference():
            self._marks.append(item._version)
        elif isinstance(item, torch.Generator):
            self._marks.append(bytes(item.get_state().numpy()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and self._marks == other._marks

    __hash__ = None  # type: ignore[assignment]


def _items(value: Any) -> Iterator[Any]:
    """Yield what a container holds, or the value itself."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, _CONTAINERS):
        yield from value
    else:
        yield value


def hooked_within(module: nn.Module) -> bool:
    """Say whether a module inside this one has hooks on its forward: they are to see it run."""
    return any(
        m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module
    )


def hooked_backwards(module: nn.Module) -> bool:
    """Say whether this module, or one inside, has hooks on its backward."""
    return any(m._backward_hooks or m._backward_pre_hooks for m in module.modules())
