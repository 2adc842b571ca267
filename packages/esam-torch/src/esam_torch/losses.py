"""Checks of `losses`, its arguments and its results."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.sharded import is_sharded
from esam_torch.values import widened

__all__ = ["LossFunction", "accepts", "check_losses", "per_sample"]

LossFunction = Callable[..., Any]

_HINT = 'return one loss per sample, as F.cross_entropy(..., reduction="none") does.'

_OF_THE_BATCH = (
    " If the loss exists only for the whole batch, return it for each of the b samples, "
    "loss.expand(b), and use gamma=1.0 without ascend=Part(...)."
)

_CLOSURE = (
    " A closure that computes the loss of the whole batch becomes two lines: "
    'losses = lambda inputs, targets: F.cross_entropy(model(inputs), targets, reduction="none"), '
    "then optimizer.step(losses, inputs, targets)."
)


def per_sample(
    returned: Any, *, expected: int | None = None, closure: bool = False
) -> tuple[Tensor, Any]:
    """Return (losses of shape (b,), the function's other results).

    Args:
        returned: a tensor, or a tuple whose first entry is one.
        expected: the number of samples in the batch, if it is known.
        closure: whether the function was called without a batch, like a torch closure.

    Raises:
        ESAMTypeError: the losses are not a tensor of floating dtype.
        ESAMValueError: the losses are not of shape (b,), are empty, or have an unexpected length.
    """
    losses, rest = returned, None
    if isinstance(returned, tuple):
        if not returned:
            raise ESAMTypeError(f"`losses` must {_HINT} Received: an empty tuple.")
        losses, *others = returned
        rest = others[0] if len(others) == 1 else tuple(others)
    if not isinstance(losses, Tensor):
        hint = _CLOSURE if closure and isinstance(losses, float) else _type_hint(losses)
        raise ESAMTypeError(f"`losses` must {_HINT}{hint} Received: {type(losses).__name__}.")
    if is_sharded(losses):
        losses = losses.full_tensor()  # type: ignore[attr-defined]
    if losses.dim() != 1:
        raise ESAMValueError(
            f"`losses` must be of shape (b,): {_shape_advice(losses, closure)} "
            f"Received: shape {tuple(losses.shape)}."
        )
    if not losses.dtype.is_floating_point:
        raise ESAMTypeError(f"`losses` must be of a floating dtype. Received: {losses.dtype}.")
    if len(losses) == 0:
        raise ESAMValueError("The batch must not be empty. Received: 0 losses.")
    if expected is not None and len(losses) != expected:
        raise ESAMValueError(
            f"`losses` must return one loss per sample in each call. Received: "
            f"{len(losses)} losses for {expected} samples."
        )
    # The mean over the batch and the differences need more digits than half precision has.
    return losses.to(widened(losses.dtype)), rest


def _shape_advice(losses: Tensor, closure: bool) -> str:
    """Return advice for losses of a shape other than (b,)."""
    if losses.dim() == 0:
        return _HINT + (_CLOSURE if closure else _OF_THE_BATCH)
    if losses.dim() == 2 and losses.shape[0] == losses.shape[1] > 1:
        return (
            "give outputs of shape (b, 1) and targets of shape (b,) the same shape with "
            ".squeeze(1), before the loss broadcasts them to (b, b); or, if these are losses of "
            "parts of a sample, average them: .flatten(1).mean(1)."
        )
    return "average the losses over the parts of each sample: .flatten(1).mean(1)."


def _type_hint(returned: Any) -> str:
    """Return a hint for a value that is not a tensor of losses but contains them."""
    if isinstance(returned, list) and returned and isinstance(returned[0], Tensor):
        return " Stack a list of losses into one tensor: torch.stack(losses)."
    if isinstance(returned, Mapping):
        return " A model's own `loss` is a mean: compute the losses from its other outputs."
    return ""


def accepts(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] = {}
) -> bool:
    """Return whether a function can be called with these arguments, as far as can be seen.

    Example:
        >>> accepts(lambda x, y: None, [1, 2]), accepts(lambda x, y: None, [1])
        (True, False)
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def check_losses(losses: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}) -> None:
    """Raise if `losses` is not callable, or its arguments are given as one list.

    Args:
        losses: a function, but it may be anything, such as a tensor of losses.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    if not callable(losses):
        raise ESAMTypeError(
            "`losses` must be a function of the batch that returns one loss per sample, because "
            f"it is evaluated again at other weights. Received: {type(losses).__name__}."
        )
    listed = len(args) == 1 and isinstance(args[0], list | tuple)
    if listed and not accepts(losses, args, kwargs) and accepts(losses, args[0], kwargs):
        raise ESAMTypeError(
            "The arguments of `losses` must be given one by one: optimizer.loss(losses, *batch). "
            f"Received: a {type(args[0]).__name__} of {len(args[0])}."
        )
