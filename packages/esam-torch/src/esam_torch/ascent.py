"""The gradient of the ascent pass, for the perturbed parameters only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    """
    scaled = loss if scaler is None else scaler.scale(loss)
    found = torch.autograd.grad(scaled, list(parameters), allow_unused=True)
    gradients = [
        torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
        for p, g in zip(parameters, found, strict=True)
    ]
    # Two parameters of one sum may be handed the same gradient tensor, or a view of something:
    # what follows writes in place.
    seen: set[int] = set()
    for i, gradient in enumerate(gradients):
        key = gradient.untyped_storage().data_ptr()
        if key in seen or not gradient.is_contiguous(memory_format=torch.preserve_format):
            gradients[i] = gradient.clone()
        seen.add(key)
    if scaler is not None:
        # scale(1) is the scale as a tensor on the device: reading its value would wait for it.
        scale = scaler.scale(torch.ones((), device=loss.device))
        torch._foreach_div_(gradients, scale)
    return gradients
