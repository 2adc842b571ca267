"""The loss of a step: an ordinary tensor whose backward runs the rest of the step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMRuntimeError
from esam_torch.compat import call_untraced

__all__ = ["loss_with_backward"]


class _Seam(torch.autograd.Function):
    """A loss with a given value, whose gradients are computed by a function."""

    @staticmethod
    def forward(
        ctx: Any,
        gradients: Callable[[Tensor], Sequence[Tensor | None]],
        value: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        """Return the value; gradients are returned for the inputs."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        """Return the gradients of the inputs, times the scale."""
        if torch.is_grad_enabled():
            raise ESAMRuntimeError(
                "`create_graph` must be False: a step's gradient is that of other weights, and "
                "cannot be differentiated again. Compute gradient penalties inside `losses`. "
                "Received: create_graph=True."
            )
        return (None, None, *call_untraced(ctx.gradients, scale))


def loss_with_backward(
    value: Tensor,
    inputs: Sequence[Tensor],
    gradients: Callable[[Tensor], Sequence[Tensor | None]],
) -> Tensor:
    """Return a differentiable 0-d tensor whose gradient a function computes in the backward.

    Autograd handles these gradients like those of any operation: it accumulates them into `.grad`,
    runs hooks, and lets DistributedDataParallel reduce them. The function is called once: a second
    backward raises an error.

    Args:
        value: 0-d, without a graph.
        inputs: the tensors to return gradients for.
        gradients: from the gradient with respect to the returned tensor, 0-d, to those with respect
            to the inputs.
    """
    result: Tensor = _Seam.apply(_once(gradients), value, *inputs)  # type: ignore[no-untyped-call]
    return result


def _once(
    gradients: Callable[[Tensor], Sequence[Tensor | None]],
) -> Callable[[Tensor], Sequence[Tensor | None]]:
    """Return a function that can be called once, and then releases its references."""
    waiting = [gradients]

    def call_once(scale: Tensor) -> Sequence[Tensor | None]:
        if not waiting:
            raise ESAMRuntimeError(
                "The backward of one of ESAM's losses must be called only once. Received: a second "
                "call, for a loss whose step has already run. Call optimizer.loss(...) again."
            )
        return waiting.pop()(scale)

    return call_once
