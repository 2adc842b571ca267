"""Slicing a batch of any shape: tuples, lists, dictionaries, keyword arguments, tensors in them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from esam_core import ESAMValueError
from esam_torch.devices import placed

__all__ = ["Whole", "detached", "mapped", "take", "unwrapped"]


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
    """Return the same nest of containers with `leaf` applied to what is in them."""
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
        # Mappings of other libraries keep their type, and whatever else they carry.
        twin = copy.copy(tree)
        twin.update(mapped_items)  # type: ignore[attr-defined]
        return twin
    return leaf(tree)


def unwrapped(batch: Any) -> Any:
    """Return the batch with every `Whole` replaced by its value."""
    return mapped(batch, lambda x: x.value if isinstance(x, Whole) else x)


def detached(tree: Any) -> Any:
    """Return the same nest with every tensor cut off from its graph."""
    return mapped(tree, lambda x: x.detach() if isinstance(x, Tensor) else x)


def take(batch: Any, indices: Tensor, batch_size: int) -> Any:
    """Return the samples `indices` of a batch: every tensor with b rows is sliced.

    Args:
        batch: any nest of tuples, lists and mappings.
        indices: (k,) indices on any device.
        batch_size: b.

    Raises:
        ESAMValueError: no tensor of the batch has b rows, so that nothing could be sliced.
    """
    sliced = 0

    def leaf(x: Any) -> Any:
        nonlocal sliced
        if isinstance(x, Whole):
            return x.value
        if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == batch_size:
            sliced += 1
            return x.index_select(0, placed(indices, x.device))
        return x

    result = mapped(batch, leaf)
    if not sliced:
        shapes: list[tuple[int, ...]] = []
        mapped(batch, lambda x: shapes.append(tuple(x.shape)) if isinstance(x, Tensor) else None)
        raise ESAMValueError(
            f"`losses` returned {batch_size} losses, so the batch must hold a tensor with "
            f"{batch_size} rows to select from. Received: tensors of shapes {shapes}."
        )
    return result
