"""Tensors by kind, their device and dtype: one fused kernel handles tensors of one kind."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Kinds", "join_kinds", "kinds_of", "split_by_kind"]

#: For each kind, the indices of its tensors.
Kinds = Sequence[Sequence[int]]


def kinds_of(tensors: Sequence[Tensor]) -> Kinds:
    """Return the indices of the tensors of each kind, in their order."""
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(found.values())


def split_by_kind(values: list[Tensor], kinds: Kinds) -> list[list[Tensor]]:
    """Return one list per kind; the only one is `values` itself."""
    if len(kinds) == 1:
        return [values]
    return [[values[i] for i in places] for places in kinds]


def join_kinds(parts: Sequence[Sequence[Tensor]], kinds: Kinds) -> list[Tensor]:
    """Return the tensors of one list per kind in their original order."""
    if len(kinds) == 1:
        return list(parts[0])
    rows = zip(kinds, parts, strict=True)
    found = {i: value for row in rows for i, value in zip(*row, strict=True)}
    return [found[i] for i in range(len(found))]
