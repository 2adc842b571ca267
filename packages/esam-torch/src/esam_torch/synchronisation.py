"""Passes without synchronisation between ranks, and values on which ranks must agree."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esam_core import ESAMRuntimeError
from esam_torch.compat import active_replicas
from esam_torch.selection import Selected
from esam_torch.sharded import mesh_groups
from esam_torch.wrappers import bare_model, replicas_of

__all__ = ["Ranks", "agree_on_samples", "without_reduction"]


def without_reduction(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which DistributedDataParallel reduces nothing.

    Forward *and* backward of a pass must run inside: the forward already prepares the reduction.
    Each rank runs the ascent pass on its own shard of the batch (m-sharpness); only the descent
    gradient is reduced.
    """
    replicas = replicas_of(model)
    return contextlib.nullcontext() if replicas is None else _no_sync(replicas)


def _no_sync(replicas: DistributedDataParallel) -> contextlib.AbstractContextManager[Any]:
    """Return torch's own context for this, after checking that the wrapper supports it."""
    if replicas.static_graph:
        raise ESAMRuntimeError(
            "`model` must be a DistributedDataParallel with static_graph=False: a step has passes "
            "that are synchronised and passes that are not. Received: static_graph=True. If it "
            "was set because of unused parameters, use find_unused_parameters=True instead."
        )
    return replicas.no_sync()


class Ranks:
    """The ranks that train a model together, by DistributedDataParallel or FSDP2.

    Args:
        model: the model that ESAM was given: the DistributedDataParallel, or the module inside it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replicas = replicas_of(model)
        self._outside = False
        self._watched = 0

    @property
    def synchronised(self) -> bool:
        """Whether a backward reduces gradients: not within the user's `no_sync`."""
        return self._replicas is None or bool(self._replicas.require_backward_grad_sync)

    @property
    def looks_for_unused(self) -> bool:
        """Whether DistributedDataParallel looks for unused parameters."""
        found = self._replicas
        return found is not None and not self._outside and bool(found.find_unused_parameters)

    def note_forward(self) -> None:
        """Find the wrapper whose forward is running, since trainers call ESAM within it."""
        if _in_a_group():
            found = active_replicas()
            self._outside = found is not None and self._is_around_model(found)
            if self._outside:
                self._replicas = found

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which no rank waits for another."""
        alone = not _in_a_group() or (self._replicas is None and self._watched >= _WATCHED)
        return contextlib.nullcontext() if alone else self._apart()

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Disable waiting for other ranks inside the context."""
        with contextlib.ExitStack() as stack:
            if self._replicas is not None and not self._outside:
                stack.enter_context(_no_sync(self._replicas))
            elif self._replicas is None:
                self._watched += 1
                stack.enter_context(self._watching(stack))
            yield

    @contextlib.contextmanager
    def _watching(self, stack: contextlib.ExitStack) -> Iterator[None]:
        """Find, when it runs, a DistributedDataParallel that was created after ESAM."""

        def found(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            if (
                self._replicas is None
                and isinstance(module, DistributedDataParallel)
                and self._is_around_model(module)
            ):
                self._replicas = module
                stack.enter_context(_no_sync(module))

        handle = nn.modules.module.register_module_forward_pre_hook(found)
        try:
            yield
        finally:
            handle.remove()

    def _is_around_model(self, replicas: DistributedDataParallel) -> bool:
        """Return whether a wrapper contains the model that ESAM was given."""
        mine = bare_model(self._model)
        return any(module is mine for module in replicas.modules())

    def agree(self, flag: bool, parameters: Sequence[Tensor]) -> bool:
        """Return whether a flag is set on every rank that trains the model: one small reduction.

        Args:
            flag: this rank's flag.
            parameters: the model's parameters, for their devices and process groups.
        """
        if self._replicas is not None:
            groups = [self._replicas.process_group]
        else:
            groups = list(dict.fromkeys(g for p in parameters for g in mesh_groups(p)))
        if not groups:
            return flag
        shared = torch.tensor(int(flag), device=parameters[0].device)
        for group in groups:
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN, group=group)
        return bool(shared)


def agree_on_samples(own: Selected, groups: Sequence[Any]) -> Selected:
    """Return the samples that the first rank of each group has selected.

    Ranks that share a batch compute the same losses. But these may differ in the last digit, and
    different samples in one pass would be a wrong pass.

    Args:
        own: this rank's selection.
        groups: process groups whose ranks share a batch.
    """
    if not groups:
        return own
    indices, weights = own.indices.contiguous(), own.weights.contiguous()
    for group in groups:
        first = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast(indices, first, group=group)
        torch.distributed.broadcast(weights, first, group=group)
    return Selected(indices, weights)


#: In how many passes to look for a wrapper that was created after ESAM.
_WATCHED = 2


def _in_a_group() -> bool:
    """Return whether this process is in a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
