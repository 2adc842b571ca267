"""Models whose weights are sharded over ranks, by FSDP2's `fully_shard` or tensor parallelism.

All ranks share one theta, so there is one epsilon, from the global gradient. Each rank perturbs its
own shards, with a norm that is summed over all ranks. With FSDP2, selection is per rank. With
tensor parallelism (`parallelize_module`), ranks share the batch too, and select the same samples.

FSDP2 has two requirements. The gradients of its parameters exist only in `.grad`, after a backward
that reduces them. And a forward reads gathered copies of the weights, which must be dropped
(`reshard`) when the shards change, because a forward without a graph keeps the root's copies.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_torch.compat import (
    distribute,
    fsdp_gathered,
    fsdp_parameter_groups,
    fsdp_process_groups,
    fsdp_reshards,
)
from esam_torch.devices import on_device, widest

__all__ = [
    "Shards",
    "Spread",
    "any_sharded",
    "distributed_like",
    "is_sharded",
    "local",
    "local_part",
    "mesh_groups",
    "placed_like",
    "reshard",
    "shards_of",
    "spread_of",
    "total_norms",
    "weight_shards",
]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing their module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of several tensors is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor (the same memory), or an unsharded tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def placed_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient that is distributed over the ranks as its parameter is.

    With tensor parallelism, a gradient may be one term of a sum over the ranks, for example.
    """
    if not is_sharded(gradient):
        return gradient
    found: Any = gradient
    placements = parameter.placements  # type: ignore[attr-defined]
    if found.placements == placements:
        return gradient
    with torch.no_grad():
        placed: Tensor = found.redistribute(placements=placements)
    return placed


def distributed_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor, such as one that was saved, distributed over the ranks as a parameter is."""
    if is_sharded(whole) and not is_sharded(parameter):
        gathered: Tensor = whole.full_tensor()  # type: ignore[attr-defined]
        return gathered
    if is_sharded(parameter) and not is_sharded(whole):
        sharded: Any = parameter
        return distribute(whole.to(parameter.device), sharded.device_mesh, sharded.placements)
    return placed_like(whole, parameter)


def shards_of(gradients: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of gradients that correspond to this rank's shards of their parameters."""
    if not any_sharded(gradients):
        return gradients
    pairs = zip(gradients, parameters, strict=True)
    return [local(placed_like(gradient, parameter)) for gradient, parameter in pairs]


def weight_shards(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's shards of parameters (the same memory), and the unsharded ones."""
    if not any_sharded(parameters):
        return list(parameters)
    return [local(p.data) if is_sharded(p) else p for p in parameters]


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of an unsharded tensor that corresponds to this rank's shard of `like`."""
    return local(distributed_like(whole, like))


def mesh_groups(tensor: Tensor, *, shards_only: bool = False) -> list[Any]:
    """Return the process groups over which a tensor is sharded; none for a plain tensor.

    Args:
        tensor: a parameter.
        shards_only: leave out the groups in which every rank holds the same shard (HSDP).
    """
    if not is_sharded(tensor):
        return []
    sharded: Any = tensor
    return [
        sharded.device_mesh.get_group(dim)
        for dim, placement in enumerate(sharded.placements)
        if not (shards_only and placement.is_replicate())
    ]


#: Process groups, with the indices of the parameters that are sharded over them.
Spread = dict[tuple[Any, ...], list[int]]


def spread_of(parameters: Sequence[Tensor]) -> Spread:
    """Return which parameters are sharded over which ranks; empty if none are."""
    places: Spread = {}
    for i, parameter in enumerate(parameters):
        groups = tuple(mesh_groups(parameter, shards_only=True))
        if groups:
            places.setdefault(groups, []).append(i)
    return places


def total_norms(norms: Tensor, spread: Spread) -> Tensor:
    """Convert (T,) norms of shards to the norms of the whole tensors.

    There is one reduction for all parameters that are sharded over the same ranks.
    """
    for groups, found in spread.items():
        index = on_device(torch.tensor(found, device="cpu"), norms.device)
        squares = norms.index_select(0, index).to(widest(norms.device)).square()
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
    """The parts of a step that differ for a sharded model.

    Args:
        modules: the modules that `fully_shard` was called on.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def check_reducing(self) -> None:
        """Raise if gradients are not reduced: epsilon is computed from the global gradient."""
        if not all(getattr(group, "reduce_grads", True) for group in self._parameter_groups()):
            raise ESAMRuntimeError(
                "With fully_shard, a step must reduce gradients: epsilon is computed from the "
                "global gradient. Received: a module with set_requires_gradient_sync(False). "
                "Accumulate without it: reduced gradients also add up in `.grad`."
            )

    @classmethod
    def of(cls, model: nn.Module) -> "Shards | None":
        """Return the shards of a model, or None if nothing is sharded."""
        modules = _fsdp_modules(model)
        return cls(modules) if modules else None

    def gathered(self) -> list[Tensor]:
        """Return the gathered weights, in which the graphs of sharded models end."""
        return [tensor for group in self._parameter_groups() for tensor in fsdp_gathered(group)]

    def groups(self) -> list[Any]:
        """Return the process groups over which `fully_shard` distributes weights and batches."""
        found = self._parameter_groups()
        return list(dict.fromkeys(group for g in found for group in fsdp_process_groups(g)))

    def _parameter_groups(self) -> list[Any]:
        """Return FSDP2's parameter groups of all modules."""
        return [group for module in self._modules for group in fsdp_parameter_groups(module)]

    @contextlib.contextmanager
    def resharding(self) -> Iterator[None]:
        """Drop each module's gathered weights after its forward, inside the context.

        FSDP2 does so itself, but not within a backward, where most of a step's forwards run.
        """
        modules = [m for m in self._modules if all(map(fsdp_reshards, fsdp_parameter_groups(m)))]
        handles = [m.register_forward_hook(lambda m, *_: m.reshard()) for m in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reshard(self) -> None:
        """Drop the gathered weights: the next forward gathers them from the shards."""
        for module in self._modules:
            module.reshard()
