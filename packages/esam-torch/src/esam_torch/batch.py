"""Slicing a batch of any shape: tuples, lists, dictionaries, keyword arguments, tensors in them."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.devices import placed

__all__ = ["Whole", "check_rows", "detached", "mapped", "take", "unwrapped"]


class Whole:
    """Marks a value of the batch that must reach `losses` whole, never a slice of it.

    A tensor whose first dimension happens to equal the batch size is taken for one row a sample.
    Wrap it where that is wrong; `losses` receives the bare value.

    Args:
        value: anything.

    Example:
        >>> import torch
        >>> from esam_torch import Whole
        >>> class_weights = Whole(torch.ones(10))     # ten classes, and ten samples in the batch
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Whole({self.value!r})"


def mapped(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return the same nest of containers with `leaf` applied to what is in them.

    Containers are tuples, lists, mappings and dataclasses, and named or derived kinds of those.
    """
    if isinstance(tree, PackedSequence):  # a named tuple, but not of one row a sample
        return leaf(tree)
    if isinstance(tree, tuple):
        items = [mapped(item, leaf) for item in tree]
        # Named tuples take their fields as separate arguments.
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [mapped(item, leaf) for item in tree]
    if isinstance(tree, Mapping):
        mapped_items = {key: mapped(value, leaf) for key, value in tree.items()}
        if type(tree) is dict:
            return mapped_items
        if not hasattr(tree, "update"):  # a read-only mapping
            return mapped_items
        # Mappings of other libraries keep their type, and whatever else they carry.
        twin = copy.copy(tree)
        twin.update(mapped_items)
        return twin
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        same = copy.copy(tree)
        for spec in dataclasses.fields(tree):
            value = mapped(getattr(tree, spec.name), leaf)
            object.__setattr__(same, spec.name, value)  # frozen ones too: it is nobody's yet
        return same
    return leaf(tree)


def unwrapped(batch: Any) -> Any:
    """Return the batch with every `Whole` replaced by its value."""
    return mapped(batch, lambda x: x.value if isinstance(x, Whole) else x)


def detached(tree: Any) -> Any:
    """Return the same nest with every tensor cut off from its graph."""
    return mapped(tree, lambda x: x.detach() if isinstance(x, Tensor) else x)


def _has_rows(x: Any, batch_size: int) -> bool:
    """Say whether something is a tensor with one row a sample."""
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == batch_size


def check_rows(batch: Any, batch_size: int, *, selecting: bool) -> None:
    """Refuse a batch that does not belong to so many losses.

    Args:
        batch: any nest of containers.
        batch_size: b, the number of losses.
        selecting: whether samples of the batch will have to be selected. If not, a batch without
            any tensor is fine: `losses` may have its data from elsewhere.

    Raises:
        ESAMValueError: no tensor of the batch has b rows.
        ESAMTypeError: it holds a PackedSequence or a nested tensor, which cannot be sliced.
    """
    leaves: list[Any] = []
    mapped(batch, leaves.append)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    ragged = [x for x in leaves if isinstance(x, PackedSequence) or getattr(x, "is_nested", False)]
    if selecting and ragged:
        raise ESAMTypeError(
            "The batch must hold tensors with one row a sample, from which samples can be taken. "
            f"Received: a {type(ragged[0]).__name__}. Pass the padded tensor and the lengths, and "
            "pack or nest them within `losses`."
        )
    if any(_has_rows(x, batch_size) for x in tensors) or not (tensors or selecting):
        return
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors) or "none"
    raise ESAMValueError(
        f"`losses` must return one loss a sample, and the batch must hold the samples as rows of "
        f"tensors. Received: {batch_size} losses, and tensors of shapes: {shapes}."
    )


def take(batch: Any, indices: Tensor, batch_size: int) -> Any:
    """Return the samples `indices` of a batch: every tensor with b rows is sliced.

    Args:
        batch: any nest of containers, checked by `check_rows`.
        indices: (k,) indices on any device.
        batch_size: b.
    """

    def leaf(x: Any) -> Any:
        if isinstance(x, Whole):
            return x.value
        return x.index_select(0, placed(indices, x.device)) if _has_rows(x, batch_size) else x

    return mapped(batch, leaf)


def taken(batch: Any, k: int, batch_size: int) -> str:
    """Return what to say of an error that comes when k of b samples have been taken."""
    leaves: list[Any] = []
    mapped(batch, leaves.append)
    whole = ", ".join(
        f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        for x in leaves
        if not _has_rows(x, batch_size) and not isinstance(x, Whole)
    )
    return (
        f"This was ESAM's descent pass, on {k} of {batch_size} samples: tensors with {batch_size} "
        f"rows were sliced. Not sliced: {whole or 'nothing'}."
    )
