"""Selecting the samples' entries from tensors, arrays, lists and other sequences."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esam_core import ESAMTypeError
from esam_torch.devices import on_device
from esam_torch.lookups import attribute, defines
from esam_torch.marks import WAYS_OUT, Whole

__all__ = ["Index", "describe", "entries", "items"]


class Index:
    """The (k,) indices of the selected samples, in the form that each kind of sequence needs."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    @functools.cached_property
    def host(self) -> list[int]:
        """The indices as numbers. If they are not on the CPU, the host waits for them."""
        return list(map(int, self.tensor.tolist()))

    @property
    def array(self) -> Any:
        """The indices as a NumPy array."""
        return np.asarray(self.host, dtype=np.intp)


def describe(x: Any) -> str:
    """Return a short description of a value: its type, and its shape or length."""
    if isinstance(x, Whole):
        return f"{describe(x.value)}, marked"
    name = type(x).__name__
    if isinstance(x, Tensor | np.ndarray):
        return f"{name} of shape {tuple(x.shape)}"
    if isinstance(x, list | tuple):
        kinds = {type(item).__name__ for item in x}
        of = f" of {kinds.pop()}" if len(kinds) == 1 else ""
        return f"{name}{of}, length {len(x)}"
    return name


def items(x: Any, index: Index) -> Any:
    """Return the selected items of a list or tuple, in one of the same type."""
    chosen = [x[i] for i in index.host]
    return chosen if type(x) is list else type(x)(chosen)


def entries(x: Any, index: Index) -> Any:
    """Return the selected rows of a tensor or array, or entries of another sequence.

    Raises:
        ESAMTypeError: the value cannot be indexed by a tensor, an array or a list.
    """
    if isinstance(x, Tensor):
        return x.index_select(0, on_device(index.tensor, x.device))
    if isinstance(x, np.ndarray):
        return x[index.array]
    if attribute(x, "iloc") is not None:  # a pandas object: its [] looks up labels
        return x.iloc[index.host]
    device = attribute(x, "device")
    here = device if isinstance(device, torch.device) else torch.device("cpu")
    tensor = on_device(index.tensor, here)
    for form in (tensor, index.array, index.host):
        try:
            part = x[form]
            if isinstance(part, list) and defines(x, "from_data_list"):  # graphs of PyG
                names = [name.removesuffix("_batch") for name in x.keys()]  # noqa: SIM118
                part = x.from_data_list(part, [name for name in names if f"{name}_batch" in x])
            if isinstance(part, type(x)) and len(part) == len(index):
                return part
        except Exception:  # an object may raise anything for an index it does not support
            continue
    raise ESAMTypeError(
        f"{type(x).__name__} cannot be indexed by a tensor, an array or a list. {WAYS_OUT}"
    )
