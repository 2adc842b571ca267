"""Gradients of the passes: of the perturbed parameters in the ascent, of all in the descent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esam_core import ESAMRuntimeError
from esam_torch.compat import without_hooks
from esam_torch.notes import own_backward
from esam_torch.sharded import local

__all__ = ["ascent_gradients", "gradients_of", "leaves_behind"]


def gradients_of(
    loss: Tensor, tensors: Sequence[Tensor], scale: Tensor, *, every: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Return the gradients of scale * loss; None for tensors that the loss does not depend on.

    No hook of a tensor runs and no `.grad` changes: that is for the backward in which ESAM's
    gradient is handed over.

    Args:
        loss: 0-d.
        tensors: for which to compute them.
        scale: 0-d, what the backward starts with.
        every: None, or, on a sharded model, all parameters that have a gradient. Those of FSDP2 get
            theirs only from a whole backward, reduced over the ranks and in `.grad`.
    """
    if every is None:
        with without_hooks(tensors), own_backward():
            try:
                found = torch.autograd.grad(loss, tensors, grad_outputs=scale, allow_unused=True)
            except RuntimeError as error:
                _refuse_reentrant(loss, error)
                raise
            return list(found)
    with without_hooks(every, accumulating=True), own_backward():
        aside = [p.grad for p in every]
        for parameter in every:
            parameter.grad = None
        try:
            torch.autograd.backward(loss, scale)
            return [t.grad for t in tensors]
        finally:
            for parameter, gradient in zip(every, aside, strict=True):
                parameter.grad = gradient


def ascent_gradients(
    loss: Tensor, tensors: Sequence[Tensor], scale: Tensor, *, every: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return dense gradients of scale * loss, zeros for tensors that it does not depend on.

    Args: as for `gradients_of`. Of sharded parameters, this rank's shards are returned.

    Raises:
        ESAMRuntimeError: the loss went through a reentrant checkpoint.
    """
    found = gradients_of(loss, tensors, scale, every=every)
    gradients = []
    for tensor, gradient in zip(tensors, found, strict=True):
        if gradient is None:
            _refuse_reentrant(loss)
            gradient = torch.zeros_like(tensor)
        gradients.append(gradient.to_dense() if gradient.is_sparse else gradient)
    return gradients if every is None else [local(g) for g in gradients]


def _refuse_reentrant(loss: Tensor, cause: BaseException | None = None) -> None:
    """Raise if a reentrant checkpoint is why parameters have no gradient.

    Its backward is a backward of its own, which `torch.autograd.grad` does not see: parameters
    used inside would seem to be unused.
    """
    for node in nodes_behind(loss):
        if node.name() == "CheckpointFunctionBackward":
            raise ESAMRuntimeError(
                "Activation checkpointing must be the non-reentrant kind: call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False). Received: a loss "
                "that went through a reentrant checkpoint."
            ) from cause


def nodes_behind(tensor: Tensor) -> list[torch.autograd.graph.Node]:
    """Return the nodes of a tensor's graph, each once."""
    waiting = [] if tensor.grad_fn is None else [tensor.grad_fn]
    seen = set(waiting)
    found = []
    while waiting:
        node = waiting.pop()
        found.append(node)
        for function, _ in node.next_functions:
            if function is not None and function not in seen:
                seen.add(function)
                waiting.append(function)
    return found


def leaves_behind(tensor: Tensor) -> list[Tensor]:
    """Return the leaves, parameters above all, that a tensor's graph ends in."""
    return [node.variable for node in nodes_behind(tensor) if hasattr(node, "variable")]
