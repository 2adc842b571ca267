"""Saving and restoring values of modules' attributes and tensors."""

import functools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esam_torch.compat import MODULE_ATTRIBUTES
from esam_torch.generators import set_state, state_of
from esam_torch.kinds import kinds_of
from esam_torch.sharded import is_sharded, local

__all__ = [
    *("MISSING", "Place", "PlaceKey", "State", "all_modules", "can_be_written", "copy_values"),
    *("data_of", "is_expanded", "is_half", "is_plain", "key_of", "places_without", "tensors_in"),
    "widened",
]

#: The place of a value: a dictionary of a module, and a name in it.
Place = tuple[dict[str, Any], str]

#: What identifies a place.
PlaceKey = tuple[int, str]


def key_of(place: Place) -> PlaceKey:
    """Return a key that identifies a place."""
    return id(place[0]), place[1]


def places_without(places: Iterable[Place], known: Iterable[Place]) -> list[Place]:
    """Return the places that are not among the known ones."""
    keys = {key_of(place) for place in known}
    return [place for place in places if key_of(place) not in keys]


#: Represents the value of a name that does not exist.
MISSING = object()

#: The containers whose contents are looked at. A union of types would be built in each call.
_CONTAINERS = (list, tuple, deque, dict)

#: The maximum depth of nested containers.
_DEPTH = 4


def copy_values(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy values in few kernels, grouped by device and dtype."""
    for places in kinds_of(targets):
        torch._foreach_copy_([targets[i] for i in places], [sources[i] for i in places])


@functools.cache
def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of values are accumulated: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def is_half(tensor: Tensor) -> bool:
    """Return whether a tensor has a floating dtype of fewer than 32 bits."""
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


def is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements of a tensor share memory, as after `expand`."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_contiguous()
        and any(
            step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        )
    )


def is_plain(value: Any) -> bool:
    """Return whether a value is a dense tensor of torch's own class, whose values can be copied.

    A DTensor is, whose values are those of this rank's shard. Nothing can write to a tensor whose
    elements share memory.
    """
    return (
        (type(value) in (Tensor, nn.Parameter) or is_sharded(value))
        and value.layout == torch.strided
        and not value.is_inference()
        and not is_expanded(value)
    )


def data_of(tensor: Tensor) -> Tensor:
    """Return a tensor's values without a graph, in the same memory; of a DTensor, its shard's."""
    return local(tensor.data)


def can_be_written(value: Any) -> bool:
    """Return whether a value is a tensor of torch's own class, and not a parameter."""
    return is_plain(value) and not isinstance(value, nn.Parameter)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value and in its containers, except parameters."""
    return filter(can_be_written, parts_of(value))


def parts_of(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """Yield a value itself or, if it is a container, its contents."""
    if depth and isinstance(value, _CONTAINERS) and _can_be_read(value):
        for part in value.values() if isinstance(value, dict) else value:
            yield from parts_of(part, depth - 1)
    else:
        yield value


def _can_be_read(value: Any) -> bool:
    """Return whether a container has a length and contents: classes may forbid both (e3nn's)."""
    if type(value) in _CONTAINERS or not isinstance(value, _CONTAINERS):
        return True
    try:
        return len(value) == sum(1 for _ in (value.items() if isinstance(value, dict) else value))
    except Exception:
        return False


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, including those that others keep in lists and other containers."""
    found = dict.fromkeys(model.modules())
    waiting = list(found)
    while waiting:
        module = waiting.pop()
        for name, value in vars(module).items():
            if name in MODULE_ATTRIBUTES or not isinstance(value, list | tuple | dict):
                continue
            for part in parts_of(value):
                if isinstance(part, nn.Module) and part not in found:
                    new = [m for m in part.modules() if m not in found]
                    found.update(dict.fromkeys(new))
                    waiting += new
    return list(found)


class _Contents:
    """An object and, if it is a mutable container, its contents; of a generator, its state."""

    def __init__(self, value: Any, depth: int = _DEPTH) -> None:
        self._value = value
        self._parts: Any = None
        self._random = state_of(value)
        if not _can_be_read(value):
            return
        if depth and isinstance(value, list | tuple | deque):
            self._parts = [_Contents(part, depth - 1) for part in value]
        elif depth and isinstance(value, dict):
            self._parts = {key: _Contents(part, depth - 1) for key, part in value.items()}
        elif isinstance(value, set):
            self._parts = set(value)

    def is_in(self, value: Any) -> bool:
        """Return whether a value is the same object, with the same objects in it."""
        if value is not self._value or state_of(value) != self._random:
            return False
        if self._parts is None or isinstance(value, set):
            return self._parts is None or bool(self._parts == value)
        if len(value) != len(self._parts):
            return False
        if isinstance(value, dict):
            return all(key in value and p.is_in(value[key]) for key, p in self._parts.items())
        return all(p.is_in(part) for p, part in zip(self._parts, value, strict=True))

    def put_back(self) -> Any:
        """Return the object, with its contents restored."""
        value, parts = self._value, self._parts
        if self._random is not None:
            set_state(value, self._random)
        if parts is None or self.is_in(value):
            return value
        if isinstance(value, list):
            value[:] = [part.put_back() for part in parts]
        elif isinstance(value, tuple):
            for part in parts:
                part.put_back()
        elif isinstance(value, deque):
            value.clear()
            value.extend(part.put_back() for part in parts)
        elif isinstance(value, dict):
            value.clear()
            value.update({key: part.put_back() for key, part in parts.items()})
        else:
            value.clear()
            value.update(parts)
        return value


class State:
    """The values of some places and tensors, to be restored bit for bit.

    They are restored only *after* a backward, because autograd reads them between forward and
    backward.

    Args:
        places: existing or missing names.
        tensors: the tensors to copy.
    """

    def __init__(self, places: Iterable[Place], tensors: Iterable[Tensor]) -> None:
        self._contents = [(*p, _Contents(p[0].get(p[1], MISSING))) for p in places]
        self._tensors = list({id(t): t for t in tensors}.values())
        values = [data_of(t) for t in self._tensors]
        self._copies = [torch.empty_like(v) for v in values]
        copy_values(self._copies, values)

    def restore(self) -> None:
        """Restore everything, even if a forward has replaced the objects."""
        for names, name, contents in self._contents:
            value = contents.put_back()
            if value is not MISSING:
                if names.get(name, MISSING) is not value:
                    names[name] = value
            else:
                names.pop(name, None)
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            if data_of(tensor).shape != copy.shape or tensor.dtype != copy.dtype:
                tensor.data = torch.empty_like(copy)
        copy_values([data_of(t) for t in self._tensors], self._copies)

    def find_changes(self) -> list[Place]:
        """Return the places whose objects were replaced."""
        return [
            (d, n) for d, n, contents in self._contents if not contents.is_in(d.get(n, MISSING))
        ]

    def unlike(self, *, without: Collection[int]) -> list[Tensor]:
        """Return the tensors whose values differ from the copies. This waits for the device.

        Args:
            without: ids of tensors to leave out.
        """
        rows: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            if id(tensor) not in without and tensor.device.type != "meta":
                rows.setdefault(tensor.device, []).append((tensor, copy))
        found: list[Tensor] = []
        for pairs in rows.values():
            flags = torch.stack([(data_of(t) != copy).any() for t, copy in pairs]).tolist()
            found += [t for (t, _), flag in zip(pairs, flags, strict=True) if flag]
        return found

    def tensors(self) -> set[int]:
        """Return the ids of the copied tensors."""
        return {id(t) for t in self._tensors}

    def part(self, places: Iterable[Place], tensors: Iterable[Tensor]) -> "State":
        """Return the state of some places and tensors.

        For unrecorded ones, a place counts as missing, and a tensor as unchanged.
        """
        contents = {(id(row[0]), row[1]): row for row in self._contents}
        copies = {id(t): copy for t, copy in zip(self._tensors, self._copies, strict=True)}
        found = State((), ())
        for names, name in places:
            found._contents.append(contents.get((id(names), name)) or (names, name, _EMPTY))
        for tensor in tensors:
            copy = copies.get(id(tensor))
            found._tensors.append(tensor)
            found._copies.append(data_of(tensor).clone() if copy is None else copy)
        return found

    def join(self, *others: "State") -> "State":
        """Return this state combined with others."""
        found = self.part((), ())
        for state in (self, *others):
            known, copied = {(id(d), n) for d, n, _ in found._contents}, found.tensors()
            found._contents += [row for row in state._contents if (id(row[0]), row[1]) not in known]
            for tensor, copy in zip(state._tensors, state._copies, strict=True):
                if id(tensor) not in copied:
                    found._tensors.append(tensor)
                    found._copies.append(copy)
        return found


#: The contents of an empty place.
_EMPTY = _Contents(MISSING)
