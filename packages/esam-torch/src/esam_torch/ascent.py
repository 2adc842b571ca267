"""Gradients of the passes: for perturbed parameters in the ascent, for all in the descent."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from esam_core import ESAMRuntimeError
from esam_torch.compat import without_hooks
from esam_torch.notes import own_backward
from esam_torch.sharded import shards_of

__all__ = ["dense_shards", "gradients_of", "graph_leaves", "graph_nodes"]


def gradients_of(
    loss: Tensor,
    tensors: Sequence[Tensor],
    scale: Tensor,
    *,
    every: Sequence[Tensor] | None,
    accumulates: bool,
) -> tuple[list[Tensor | None], bool]:
    """Return the gradients of scale * loss; None for tensors that the loss does not depend on.

    No tensor hook runs and no `.grad` changes; this happens only in the backward that passes on
    ESAM's gradient.

    Args:
        loss: 0-d.
        tensors: the tensors to compute gradients for.
        scale: 0-d, the initial gradient of the backward.
        every: None or, for a sharded model, all leaves of the loss. FSDP2 computes gradients only
            in a whole backward, reduced over the ranks and in `.grad`.
        accumulates: whether the backward of a layer may add gradients to `.grad` itself, as that of
            a reversible layer does, which runs a backward of its own.

    Returns:
        The gradients, and whether a layer did so.
    """
    if every is None:
        if not loss.requires_grad:
            return [None] * len(tensors), False
        layers = _collecting(tensors if accumulates else ())
        with without_hooks(tensors), own_backward(), layers as own:
            try:
                # The user may have frozen some since the forward.
                live = [t for t in tensors if t.requires_grad]
                found = torch.autograd.grad(loss, live, grad_outputs=scale, allow_unused=True)
            except RuntimeError as error:
                _refuse_reentrant(loss, error)
                raise
        given: list[Tensor | None] = list(found)
        if len(live) < len(tensors):
            rows = iter(found)
            given = [next(rows) if t.requires_grad else None for t in tensors]
        if not own:
            return given, False
        return [_sum(g, own.get(id(t))) for g, t in zip(given, tensors, strict=True)], True
    with without_hooks(every, accumulating=True), own_backward():
        aside = [p.grad for p in every]
        for parameter in every:
            parameter.grad = None
        try:
            torch.autograd.backward(loss, scale)
            return [t.grad for t in tensors], False
        finally:
            for parameter, gradient in zip(every, aside, strict=True):
                parameter.grad = gradient


def dense_shards(
    found: Sequence[Tensor | None], tensors: Sequence[Tensor], loss: Tensor
) -> list[Tensor]:
    """Return dense gradients, with zeros for None; of sharded parameters, this rank's shards.

    Args:
        found: the gradients of the loss.
        tensors: the tensors that they belong to.
        loss: 0-d.

    Raises:
        ESAMRuntimeError: a gradient is None, and the loss was computed through a reentrant
            checkpoint.
    """
    missing = [tensor for tensor, gradient in zip(tensors, found, strict=True) if gradient is None]
    if missing:
        _refuse_reentrant(loss)
    gradients = [
        torch.zeros_like(tensor.detach())
        if gradient is None
        else gradient.to_dense()
        if gradient.is_sparse
        else gradient
        for tensor, gradient in zip(tensors, found, strict=True)
    ]
    return shards_of(gradients, tensors)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, either of which may be missing."""
    return b if a is None else a if b is None else a + b


@contextlib.contextmanager
def _collecting(tensors: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Collect, by id, what a backward inside the context adds to `.grad`, which it leaves alone."""
    aside = [tensor.grad for tensor in tensors]
    own: dict[int, Tensor] = {}
    try:
        for tensor in tensors:
            tensor.grad = None
        yield own
        own.update((id(tensor), tensor.grad) for tensor in tensors if tensor.grad is not None)
    finally:
        for tensor, gradient in zip(tensors, aside, strict=True):
            tensor.grad = gradient


def _refuse_reentrant(loss: Tensor, cause: BaseException | None = None) -> None:
    """Raise if a reentrant checkpoint is why parameters have no gradient.

    It runs a separate backward, which `torch.autograd.grad` does not see: parameters used inside it
    seem to be unused.
    """
    for node in graph_nodes(loss)[0]:
        if node.name() == "CheckpointFunctionBackward":
            raise ESAMRuntimeError(
                "Activation checkpointing must be non-reentrant: call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False). Received: a loss "
                "computed through a reentrant checkpoint."
            ) from cause


def graph_nodes(
    tensor: Tensor,
) -> tuple[set[torch.autograd.graph.Node], list[torch.autograd.graph.Node]]:
    """Return all nodes of a tensor's graph, and those at its ends."""
    waiting = [] if tensor.grad_fn is None else [tensor.grad_fn]
    seen = set(waiting)
    ends = []
    while waiting:
        node = waiting.pop()
        following = node.next_functions
        if not following:
            ends.append(node)
        for function, _ in following:
            if function is not None and function not in seen:
                seen.add(function)
                waiting.append(function)
    return seen, ends


def graph_leaves(tensor: Tensor) -> list[Tensor]:
    """Return the leaves (mainly parameters) of a tensor's graph."""
    _, ends = graph_nodes(tensor)
    return [node.variable for node in ends if hasattr(node, "variable")]
