"""Passes that ranks run on their own, and what they must agree on."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMRuntimeError
from esam_torch.sharded import mesh_groups

__all__ = ["on_every_rank", "unsynchronised"]


def _replicated(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the DistributedDataParallel that a model is or that torch.compile has wrapped."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def unsynchronised(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which DistributedDataParallel reduces nothing.

    Forward *and* backward of a pass must run inside: the forward already arms the reduction. Each
    rank climbs on its own shard of the batch (m-sharpness); ranks meet in the descent gradient.
    """
    replicated = _replicated(model)
    if replicated is None:
        return contextlib.nullcontext()
    if replicated.static_graph:
        raise ESAMRuntimeError(
            "`model` must be a DistributedDataParallel with static_graph=False: a step has passes "
            "that are synchronised and passes that are not. Received: static_graph=True. Where a "
            "static graph was chosen for unused parameters, use find_unused_parameters=True."
        )
    return replicated.no_sync()


def on_every_rank(flag: bool, model: nn.Module, parameters: Sequence[Tensor]) -> bool:
    """Say whether a flag is set on every rank that trains the model: one small reduction.

    Args:
        flag: this rank's.
        model: what is trained.
        parameters: its parameters, for where they are and whom they are shared with.
    """
    replicated = _replicated(model)
    if replicated is not None:
        groups = [replicated.process_group]
    else:
        groups = list(dict.fromkeys(g for p in parameters for g in mesh_groups(p)))
    if not groups:
        return flag
    shared = torch.tensor(int(flag), device=parameters[0].device)
    for group in groups:
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN, group=group)
    return bool(shared)
