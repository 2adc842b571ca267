"""What `losses` must return, checked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMTypeError, ESAMValueError

__all__ = ["LossFunction", "per_sample"]

LossFunction = Callable[..., Any]

_HINT = 'return one loss a sample, as F.cross_entropy(..., reduction="none") does.'


def per_sample(returned: Any, *, expected: int | None = None) -> tuple[Tensor, Any]:
    """Return (losses of shape (b,), everything else that the function returned).

    Args:
        returned: a tensor, or a tuple whose first entry is one.
        expected: the number of samples that went in, where it is known.

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
        raise ESAMTypeError(f"`losses` must {_HINT} Received: {type(losses).__name__}.")
    if losses.dim() != 1:
        raise ESAMValueError(
            f"`losses` must be of shape (b,): {_HINT} Received: shape {tuple(losses.shape)}."
        )
    if not losses.dtype.is_floating_point:
        raise ESAMTypeError(f"`losses` must be floating. Received: dtype {losses.dtype}.")
    if len(losses) == 0:
        raise ESAMValueError("The batch must not be empty. Received: 0 losses.")
    if expected is not None and len(losses) != expected:
        raise ESAMValueError(
            f"`losses` must return one loss a sample. Received: {len(losses)} losses for "
            f"{expected} samples. Is a tensor of the batch sliced that should not be? Wrap it in "
            "Whole(...). Are there samples in something that is no tensor (an array, a list of "
            "texts), and so not sliced? Pass them as tensors."
        )
    # Half-precision losses: the mean over the batch and the differences need more digits.
    return losses.to(torch.promote_types(losses.dtype, torch.float32)), rest
