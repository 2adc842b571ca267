"""ESAM in a training loop of Hugging Face Accelerate."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from esam_core import ESAMTypeError, ESAMValueError, StepReport
from esam_torch.losses import LossFunction
from esam_torch.optimizer import ESAM

__all__ = ["backward", "check_skipping", "descending", "esam_in"]


def backward(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    losses: LossFunction,
    *batch: Any,
    **kwargs: Any,
) -> StepReport:
    """Add ESAM's gradient to `.grad`: stands where `accelerator.backward(loss)` stood.

    The descent pass goes through `accelerator.backward`, with its loss scaling and its division by
    the number of accumulated batches; the ascent uses the same scaler.

    Args:
        accelerator: the `accelerate.Accelerator`.
        model: what `accelerator.prepare` made of the model, and what `losses` calls.
        optimizer: what it made of the `ESAM`.
        losses: a function of the batch that returns one loss a sample, as in `ESAM.backward`.
        *batch: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        The step's report.

    Raises:
        ESAMTypeError: `optimizer` holds no `ESAM`.
        ESAMValueError: several processes accumulate batches, and `on_nonfinite` is "skip".

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from torch.nn import functional as F
        >>> from esam_torch import ESAM
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> def losses(inputs, targets):
        ...     return F.cross_entropy(model(inputs), targets, reduction="none")
        >>> report = backward(
        ...     accelerator, model, optimizer, losses, torch.randn(8, 4), torch.randint(3, (8,))
        ... )
        >>> optimizer.step()
    """
    esam = esam_in(optimizer)
    check_skipping(esam, accelerator.num_processes, accelerator.gradient_accumulation_steps)
    if esam.model is not model:
        esam.model = model
    if esam.scaler is not accelerator.scaler:
        esam.scaler = accelerator.scaler
    with descending(esam, accelerator.backward):
        return esam.backward(losses, *batch, **kwargs)


def esam_in(optimizer: Any) -> ESAM:
    """Return the `ESAM` that a trainer has wrapped."""
    inner = optimizer
    while not isinstance(inner, ESAM) or type(inner).__name__.startswith("Lightning"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise ESAMTypeError(
                f"`optimizer` must hold an ESAM. Received: {type(optimizer).__name__}."
            )
    return inner


def check_skipping(esam: ESAM, processes: int, accumulated: int) -> None:
    """Refuse to skip batches where ranks add their gradients up with the last of several only.

    Without that one, each would go on with gradients that it had never added to the others'.
    """
    if processes > 1 and accumulated > 1 and esam.config.on_nonfinite == "skip":
        raise ESAMValueError(
            '`on_nonfinite` must be "propagate" or "raise" where several processes accumulate '
            "batches: they add their gradients up with the last batch, which may not be left out. "
            'Received: on_nonfinite="skip".'
        )


@contextlib.contextmanager
def descending(esam: ESAM, backward: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let the descent's loss be back-propagated by a trainer's function while this lasts."""
    esam._descend = backward
    try:
        yield
    finally:
        esam._descend = None
