"""What `losses` must return, checked."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMTypeError, ESAMValueError

__all__ = ["LossFunction", "check_losses", "per_sample"]

LossFunction = Callable[..., Any]

_HINT = 'return one loss per sample, as F.cross_entropy(..., reduction="none") does.'

_CLOSURE = (
    " A closure that computes the loss of the whole batch becomes two lines: "
    'losses = lambda inputs, targets: F.cross_entropy(model(inputs), targets, reduction="none"), '
    "then optimizer.step(losses, inputs, targets)."
)


def per_sample(
    returned: Any, *, expected: int | None = None, closure: bool = False
) -> tuple[Tensor, Any]:
    """Return (losses of shape (b,), everything else that the function returned).

    Args:
        returned: a tensor, or a tuple whose first entry is one.
        expected: the number of samples that went in, where it is known.
        closure: whether the function was called without a batch, as a closure of torch's is.

    Raises:
        ESAMTypeError: not a tensor, or not of a floating dtype.
        ESAMValueError: not of shape (b,), empty, or of another length than expected.
    """
    losses, rest = returned, None
    if isinstance(returned, tuple):
        if not returned:
            raise ESAMTypeError(f"`losses` must {_HINT} Received: an empty tuple.")
        losses, *others = returned
        rest = others[0] if len(others) == 1 else tuple(others)
    if not isinstance(losses, Tensor):
        hint = _CLOSURE if closure and isinstance(losses, float) else _how_to_get_losses(losses)
        raise ESAMTypeError(f"`losses` must {_HINT}{hint} Received: {type(losses).__name__}.")
    if losses.dim() != 1:
        raise ESAMValueError(
            f"`losses` must be of shape (b,): {_how_to_get_one_each(losses, closure)} "
            f"Received: shape {tuple(losses.shape)}."
        )
    if not losses.dtype.is_floating_point:
        raise ESAMTypeError(f"`losses` must be floating. Received: dtype {losses.dtype}.")
    if len(losses) == 0:
        raise ESAMValueError("The batch must not be empty. Received: 0 losses.")
    if expected is not None and len(losses) != expected:
        raise ESAMValueError(
            f"`losses` must return one loss per sample, each time that it is called. Received: "
            f"{len(losses)} losses for {expected} samples."
        )
    # Half-precision losses: the mean over the batch and the differences need more digits.
    return losses.to(torch.promote_types(losses.dtype, torch.float32)), rest


def _how_to_get_one_each(losses: Tensor, closure: bool) -> str:
    """Return what to do with losses of another shape than (b,)."""
    if losses.dim() == 0:
        return _HINT + (_CLOSURE if closure else "")
    if losses.dim() == 2 and losses.shape[0] == losses.shape[1] > 1:
        return (
            "bring outputs of shape (b, 1) and targets of shape (b,) to one shape, with "
            ".squeeze(1), before the loss makes a square of them; or, if these are the losses of "
            "parts of a sample, average them: .flatten(1).mean(1)."
        )
    return "average the losses of the parts of each sample: .flatten(1).mean(1)."


def _how_to_get_losses(returned: Any) -> str:
    """Return a hint for something that is no tensor of losses, but holds them."""
    if isinstance(returned, list) and returned and isinstance(returned[0], Tensor):
        return " Put the losses of a list into one tensor: torch.stack(losses)."
    if isinstance(returned, Mapping):
        return " A model's own `loss` is a mean: compute the losses from its other outputs."
    return ""


def check_losses(losses: Any) -> None:
    """Refuse what cannot be called, a tensor of losses above all."""
    if not callable(losses):
        raise ESAMTypeError(
            "`losses` must be a function of the batch that returns one loss per sample, so that it "
            f"can be evaluated again at other weights. Received: {type(losses).__name__}."
        )
