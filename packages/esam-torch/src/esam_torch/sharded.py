"""Models whose weights are sharded over ranks, by FSDP2's `fully_shard`.

All ranks share one theta, so there is one epsilon, from the global gradient: each rank perturbs
its own shards, by a norm that is summed up over all of them. Selection stays per rank.

What FSDP2 asks for: the gradients of its parameters exist only in `.grad`, after a backward that
reduces them; and a forward reads gathered copies of the weights, which must be dropped
(`reshard`) whenever the shards change, because a forward without a graph leaves the root's behind.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_torch.compat import fsdp_parameter_groups

__all__ = ["Shards", "local", "local_part", "mesh_groups", "reshard", "total_norms"]


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor; their module is loaded where one exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that is on this rank: the same memory; else the tensor."""
    if not _is_sharded(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of an unsharded tensor that this rank holds of `like`."""
    if not _is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    # src_data_rank=None: every rank has the whole, and nothing is sent.
    return local(
        distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    )


def mesh_groups(tensor: Tensor, *, shards_only: bool = False) -> list[Any]:
    """Return the process groups over which a tensor is spread; none for a plain tensor.

    Args:
        tensor: a parameter.
        shards_only: leave out the groups in which every rank holds the same shard (HSDP).
    """
    if not _is_sharded(tensor):
        return []
    sharded: Any = tensor
    return [
        sharded.device_mesh.get_group(dim)
        for dim, placement in enumerate(sharded.placements)
        if not (shards_only and placement.is_replicate())
    ]


def total_norms(norms: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Turn (T,) norms of shards into the norms of the whole tensors.

    One reduction for all parameters that are sharded over the same ranks.
    """
    places: dict[tuple[Any, ...], list[int]] = {}
    for i, parameter in enumerate(parameters):
        groups = tuple(mesh_groups(parameter, shards_only=True))
        if groups:
            places.setdefault(groups, []).append(i)
    for groups, found in places.items():
        index = torch.tensor(found, device=norms.device)
        squares = norms.index_select(0, index).double().square()
        for group in groups:
            torch.distributed.all_reduce(squares, group=group)
        norms = norms.index_copy(0, index, squares.sqrt().to(norms.dtype))
    return norms


def reshard(model: nn.Module) -> None:
    """Drop the gathered weights of every module that FSDP2 shards."""
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ESAMTypeError(
                "`model` must be sharded by torch.distributed.fsdp.fully_shard (FSDP2). Received: "
                "FullyShardedDataParallel (FSDP1), whose flattened weights have no units."
            )
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


class Shards:
    """What a step does differently on a sharded model.

    Args:
        modules: the modules that `fully_shard` was called on.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def check_reducing(self) -> None:
        """Refuse gradients that stay on their rank: epsilon comes from the global gradient."""
        for module in self._modules:
            for group in fsdp_parameter_groups(module):
                if not getattr(group, "reduce_grads", True):
                    raise ESAMRuntimeError(
                        "With fully_shard, a step must reduce gradients: epsilon comes from the "
                        "global gradient. Received: a module with "
                        "set_requires_gradient_sync(False). Accumulate without it: reduced "
                        "gradients add up in `.grad` just as well."
                    )

    @classmethod
    def of(cls, model: nn.Module) -> "Shards | None":
        """Return the shards of a model, or None where nothing is sharded."""
        modules = _fsdp_modules(model)
        return cls(modules) if modules else None

    def reshard(self) -> None:
        """Drop the gathered weights: the next forward gathers them from the shards."""
        for module in self._modules:
            module.reshard()
