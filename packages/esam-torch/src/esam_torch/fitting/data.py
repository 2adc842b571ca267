"""Batches from a loader: moving them to a device and turning them into arguments."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from esam_torch.containers import INSIDE, is_container, is_tensor_collection, map_values
from esam_torch.devices import copies_ahead
from esam_torch.lookups import attribute
from esam_torch.marks import Mark

__all__ = ["Arguments", "arguments", "choose_device", "groups_of", "move_batch"]

Arguments = tuple[Any, ...]


def choose_device(device: torch.device | str) -> torch.device:
    """Return a device; "auto" is the accelerator if there is one, else the CPU."""
    if device != "auto":
        return torch.device(device)
    for name in ("cuda", "xpu", "mps"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return torch.device(name)
    return torch.device("cpu")


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on a device, copied from pinned memory without waiting."""

    def visit(x: Any, _: str) -> Any:
        if isinstance(x, Mark):
            return type(x)(move_batch(x.value, device))
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=copies_ahead(device))
        if is_container(x) and not is_tensor_collection(x):
            return INSIDE
        # Also batches of other libraries: a PackedSequence, graphs of PyG and DGL.
        moves = callable(attribute(x, "to")) and not isinstance(x, type)
        return x.to(device) if moves else x

    return map_values(batch, visit)


def arguments(batch: Any) -> Arguments:
    """Return a batch as arguments: several for a tuple or list, one for anything else."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def groups_of(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield batches in groups of `size`; the last group may be smaller."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, size)):
        yield group
