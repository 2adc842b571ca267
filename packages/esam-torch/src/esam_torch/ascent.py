"""The gradient of the ascent pass, for the perturbed parameters only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMRuntimeError
from esam_torch.notes import own_backward

__all__ = ["ascent_gradients"]


def ascent_gradients(
    loss: Tensor, parameters: Sequence[Tensor], *, scaler: Any = None
) -> list[Tensor]:
    """Return the dense gradients of a loss; zeros for parameters that it does not depend on.

    `torch.autograd.grad` computes no weight gradient that is not asked for, and goes no deeper
    than the shallowest parameter asked for. It touches no `.grad`.

    Args:
        loss: 0-d.
        parameters: which ones.
        scaler: None, or a `torch.amp.GradScaler`: the backward is scaled, so that fp16 gradients
            do not underflow, and the result divided by the scale.

    Raises:
        ESAMRuntimeError: the loss went through a reentrant checkpoint.
    """
    scaled = loss if scaler is None else scaler.scale(loss)
    try:
        with own_backward():
            found = torch.autograd.grad(scaled, list(parameters), allow_unused=True)
    except RuntimeError as error:
        _refuse_reentrant(scaled, error)
        raise
    if any(g is None for g in found):
        _refuse_reentrant(scaled)
    gradients = [
        torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
        for p, g in zip(parameters, found, strict=True)
    ]
    # What follows writes in place: two parameters of one sum may have been handed the same tensor,
    # and the gradient of a sum is one number seen many times.
    seen: set[int] = set()
    for i, gradient in enumerate(gradients):
        key = gradient.untyped_storage().data_ptr()
        if key in seen or _repeats(gradient):
            gradients[i] = gradient.clone(memory_format=torch.contiguous_format)
        seen.add(key)
    if scaler is not None:
        # scale(1) is the scale as a tensor on the device: reading its value would wait for it.
        scale = scaler.scale(torch.ones((), device=loss.device))
        torch._foreach_div_(gradients, scale)
    return gradients


def _repeats(tensor: Tensor) -> bool:
    """Say whether several elements of a tensor are one place in memory, as after `expand`."""
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _refuse_reentrant(loss: Tensor, cause: BaseException | None = None) -> None:
    """Raise if a reentrant checkpoint is why parameters have no gradient.

    Its backward is a backward of its own, which `torch.autograd.grad` does not see: parameters
    used inside would seem to be unused.
    """
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ESAMRuntimeError(
                "Activation checkpointing must be the non-reentrant kind: call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False). Received: a loss "
                "that went through a reentrant checkpoint."
            ) from cause
        following = {function for function, _ in node.next_functions} - seen
        seen |= following
        waiting.extend(following)
