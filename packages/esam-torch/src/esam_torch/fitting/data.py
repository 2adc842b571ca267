"""What a loader yields: onto the device, and into arguments."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from esam_torch.containers import INSIDE, is_tensor_collection, map_values
from esam_torch.marks import Rows, Whole

__all__ = ["Arguments", "arguments", "chosen_device", "groups_of", "moved"]

Arguments = tuple[Any, ...]


def chosen_device(device: torch.device | str) -> torch.device:
    """Return a device; "auto" is the accelerator where there is one, else the CPU."""
    if device != "auto":
        return torch.device(device)
    for name in ("cuda", "xpu", "mps"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return torch.device(name)
    return torch.device("cpu")


def moved(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on a device; from pinned memory without waiting."""

    def visit(x: Any, _: str) -> Any:
        if isinstance(x, Rows | Whole):
            return type(x)(moved(x.value, device))
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True)
        return x.to(device) if is_tensor_collection(x) else INSIDE

    return map_values(batch, visit)


def arguments(batch: Any) -> Arguments:
    """Return a batch as arguments: a tuple or list is several, anything else is one."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def groups_of(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield batches in groups of `size`, the last one of what is left."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, size)):
        yield group
