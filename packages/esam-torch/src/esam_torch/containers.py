"""Traversal of containers of any library: tuples, lists, mappings and records."""

import copy
import dataclasses
import functools
import types
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from esam_core import ESAMTypeError
from esam_torch.generators import is_generator
from esam_torch.lookups import attribute, defines
from esam_torch.marks import WAYS_OUT

__all__ = [
    "INSIDE",
    "detach_tree",
    "is_container",
    "is_object_of_samples",
    "is_record",
    "is_tensor_collection",
    "map_values",
    "own_objects_inside",
    "parts",
    "tensors_inside",
]

#: The most frequent types without parts.
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))

#: Types with a length that no pass needs a copy of.
_WITHOUT_COPIES = (Tensor, np.ndarray, nn.Module, tuple, str, bytes, type)

#: Types with attributes that are no values of a batch.
_WITHOUT_VALUES = (
    *(*_WITHOUT_COPIES, torch.optim.Optimizer, functools.partial, types.ModuleType),
    *(types.FunctionType, types.MethodType),
)

#: A visitor returns this to visit the parts of a container, one by one.
INSIDE: Any = object()

#: Represents a field without a value.
_MISSING = object()

#: How deep containers may be nested. One that contains itself has no end.
_DEEPEST = 50


def map_values(
    tree: Any,
    visit: Callable[[Any, str], Any],
    path: str = "batch",
    *,
    strict: bool = True,
    fresh: bool = False,
    around: frozenset[int] = frozenset(),
) -> Any:
    """Return nested containers with new values; the same object if nothing changes.

    Args:
        tree: anything.
        visit: is called with each node and its place, such as `batch[0]['x']`. It returns the new
            value, or INSIDE to visit the parts of the node; a node without parts is then kept.
        path: the place of `tree`.
        strict: whether a container that cannot be rebuilt is an error. If not, it is kept.
        fresh: whether containers are copied even if nothing changes, where that is possible.
        around: the ids of the containers that `tree` is in.

    Raises:
        ESAMTypeError: `strict` is set, and a container of another library cannot be rebuilt or a
            container contains itself.
    """
    found = visit(tree, path)
    if found is not INSIDE:
        return found
    inside = parts(tree)
    if inside is None:
        return tree
    if id(tree) in around or len(around) == _DEEPEST:
        if not strict:
            return tree
        raise NestedTooDeepError(
            f"`{path[:60]}...` must not contain itself, nor nest containers more than {_DEEPEST} "
            f"deep. {WAYS_OUT} Received: a {type(tree).__name__}."
        )
    around = around | {id(tree)}
    values = [
        map_values(value, visit, path + place, strict=strict, fresh=fresh, around=around)
        for place, value in inside
    ]
    same = all(new is old for new, (_, old) in zip(values, inside, strict=True))
    if same and not fresh:
        return tree
    twin = _rebuild(tree, inside, values)
    if twin is not None:
        return twin
    if same or not strict:
        return tree
    raise ESAMTypeError(
        f"`{path}` is a {type(tree).__name__}, which cannot be rebuilt with other values. Pass its "
        f"values as separate arguments. {WAYS_OUT}"
    )


class NestedTooDeepError(ESAMTypeError):
    """A container contains itself, or containers are nested too deep."""


def detach_tree(tree: Any) -> Any:
    """Return the same nested containers with every tensor detached; unknown types are kept."""

    def visit(x: Any, _: str) -> Any:
        return x.detach() if isinstance(x, Tensor) or is_tensor_collection(x) else INSIDE

    return map_values(tree, visit, strict=False)


def is_record(x: Any) -> bool:
    """Return whether a value is a named tuple or similar."""
    return isinstance(x, tuple) and (defines(x, "_fields") or defines(x, "n_sequence_fields"))


def is_list(x: Any) -> bool:
    """Return whether a value is a list or a tuple of items, and not a named tuple."""
    return isinstance(x, list | tuple) and not is_record(x)


def is_tensor_collection(x: Any) -> bool:
    """Return whether a value is a TensorDict or a tensorclass, which have a batch size."""
    return (isinstance(x, Mapping) or _is_dataclass(x)) and isinstance(
        attribute(x, "batch_size"), torch.Size
    )


def _is_dataclass(x: Any) -> bool:
    """Return whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


def is_object_of_samples(x: Any) -> bool:
    """Return whether a value is a batch of another library, such as PyG's, that can be copied.

    Its entries can be indexed, and it defines what a shallow copy is. A pandas object's is deep.
    """
    if type(x) in _PLAIN or isinstance(x, _WITHOUT_COPIES) or is_container(x):
        return False
    if attribute(x, "__dict__") is None or attribute(x, "iloc") is not None:
        return False
    return defines(x, "__len__", "__getitem__", "__copy__")


def _is_own_object(x: Any) -> bool:
    """Return whether a value is an object of the user's own class with tensors or generators.

    Not a pandas object, whose attributes refer to each other.
    """
    if type(x) in _PLAIN or isinstance(x, _WITHOUT_VALUES) or is_container(x):
        return False
    own = attribute(x, "__dict__")
    if not own or is_object_of_samples(x) or attribute(x, "iloc") is not None:
        return False
    others = any(isinstance(value, np.ndarray) or is_generator(value) for value in own.values())
    return others or next(_tensors_of_object(own.values()), None) is not None


def is_container(x: Any) -> bool:
    """Return whether a value has parts: a tuple, list, mapping or dataclass of any kind."""
    if isinstance(x, PackedSequence | torch.Size | nn.Module) or is_tensor_collection(x):
        return False
    return isinstance(x, tuple | list | Mapping | UserDict) or _is_dataclass(x)


def parts(tree: Any) -> list[tuple[str, Any]] | None:
    """Return the places and values inside a container, or None for anything else.

    Containers are tuples, lists, mappings and dataclasses, and their subclasses.
    """
    if type(tree) in _PLAIN or not is_container(tree):
        return None
    if isinstance(tree, tuple) and (names := attribute(tree, "_fields")) is not None:
        return [(f".{name}", value) for name, value in zip(names, tree, strict=True)]
    if isinstance(tree, tuple | list):
        return [(f"[{i}]", value) for i, value in enumerate(tree)]
    if _is_dataclass(tree):
        # ModelOutput is also a mapping, and keeps its items and its attributes consistent.
        return [(f".{name}", getattr(tree, name)) for name in _attributes(tree)]
    if isinstance(tree, UserDict):
        # Its items and its other attributes (such as the encodings of a tokenizer).
        return [("" if name == "data" else f".{name}", x) for name, x in vars(tree).items()]
    return [(f"[{key!r}]", tree[key]) for key in tree]


def tensors_inside(tree: Any, around: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """Yield the tensors in nested containers of any library."""
    if isinstance(tree, Tensor):
        yield tree
    elif type(tree) not in _PLAIN and id(tree) not in around and len(around) <= _DEEPEST:
        within: Iterable[Any] = [x for _, x in parts(tree) or ()]
        if isinstance(tree, deque):
            within = tree
        elif is_tensor_collection(tree):
            within = tree.values()
        elif is_object_of_samples(tree) or _is_own_object(tree):
            yield from _tensors_of_object(vars(tree).values())
        around = around | {id(tree)}
        for part in within:
            yield from tensors_inside(part, around)


def own_objects_inside(tree: Any) -> Iterator[Any]:
    """Yield the objects of the user's own classes in nested containers that contain tensors."""
    found: dict[int, Any] = {}

    def visit(x: Any, _: str) -> Any:
        if _is_own_object(x):
            found[id(x)] = x
        return INSIDE

    map_values(tree, visit, strict=False)
    yield from found.values()


def _tensors_of_object(values: Iterable[Any], depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors among the attributes of an object, and in its mappings."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, Mapping):
            yield from _tensors_of_object(value.values(), depth - 1)


def _attributes(record: Any) -> list[str]:
    """Return the names of a dataclass's fields and of any further attributes."""
    names = [f.name for f in dataclasses.fields(record)]
    fields = [name for name in names if attribute(record, name, _MISSING) is not _MISSING]
    return list(dict.fromkeys([*fields, *attribute(record, "__dict__", ())]))


def _rebuild(tree: Any, inside: list[tuple[str, Any]], values: list[Any]) -> Any:
    """Return a container of the same type with other values, or None if that fails."""
    if type(tree) is tuple:
        return tuple(values)
    if type(tree) is list:
        return values
    if type(tree) is dict:
        return dict(zip(tree, values, strict=True))
    try:
        twin = _rebuild_other(tree, inside, values)
        found, kept = parts(twin), parts(tree)
    except Exception:  # another library's constructor or setter may raise anything
        return None
    if kept is None or any(a is not b for (_, a), (_, b) in zip(kept, inside, strict=True)):
        # The copy shares its storage with the original, which must not change.
        if defines(tree, "update"):
            tree.update({key: old for key, (_, old) in zip(list(tree), inside, strict=True)})
        return None
    right = found is not None and [id(x) for _, x in found] == [id(x) for x in values]
    return twin if right else None


def _rebuild_other(tree: Any, inside: list[tuple[str, Any]], values: list[Any]) -> Any:
    """Return a container of another library's type with other values."""
    if isinstance(tree, tuple):
        return attribute(tree, "_make", type(tree))(values)
    if isinstance(tree, Mapping) and not (_is_dataclass(tree) or isinstance(tree, UserDict)):
        items = dict(zip(tree, values, strict=True))
        if not defines(tree, "update"):  # a read-only mapping
            return type(tree)(items)  # type: ignore[call-arg]
        same: Any = copy.copy(tree)  # keeps its other attributes
        same.update(items)
        return same
    twin: Any = copy.copy(tree)
    if isinstance(tree, list):
        twin[:] = values
        return twin
    names = list(vars(tree)) if isinstance(tree, UserDict) else _attributes(tree)
    frozen = _is_dataclass(tree) and tree.__dataclass_params__.frozen
    put = object.__setattr__ if frozen else setattr  # a frozen copy is not in use yet
    for name, (_, old), new in zip(names, inside, values, strict=True):
        if new is not old:
            put(twin, name, new)
    return twin
