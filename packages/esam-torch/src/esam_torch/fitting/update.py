"""One update: gradients of one or several batches, and the base optimizer's step."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import StepReport
from esam_torch.batch import Samples
from esam_torch.fitting.checks import check_arguments
from esam_torch.fitting.data import Arguments
from esam_torch.fitting.measures import ModelLosses, Seen
from esam_torch.losses import per_sample
from esam_torch.optimizer import ESAM
from esam_torch.synchronisation import without_reduction

__all__ = ["Update"]

#: The autocast dtype, by the name of the precision.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Update:
    """Runs updates of a model.

    Args:
        model: the trained model, with its wrappers.
        optimizer: an `ESAM` or another optimizer.
        losses: a function of the model and a batch.
        device: the model's device.
        precision: the autocast precision of `losses`: "fp32", "bf16" or "fp16".
        scaler: the gradient scaler of fp16, or None.
        clip_norm: the maximum norm of the gradient, or None.
        clip_value: the maximum absolute value in the gradient, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: ModelLosses
    device: torch.device
    precision: str = "fp32"
    scaler: Any = None
    clip_norm: float | None = None
    clip_value: float | None = None
    _checked: bool = field(default=False, init=False)

    def __call__(self, group: Sequence[Arguments]) -> tuple[list[StepReport], bool]:
        """Run one update with the mean gradient of a group of batches.

        Returns:
            A report for each batch, and whether the optimizer's step was run. It is not if a scaler
            found a gradient that is not finite, or if every batch was skipped.
        """
        if not self._checked:
            check_arguments(self.losses, self.model, group[0])
            self._checked = True
        self.optimizer.zero_grad()
        reports = []
        for place, batch in enumerate(group, 1):
            # Ranks reduce their gradients once, with the last batch. If batches may be skipped,
            # they reduce with each batch: the last one may be skipped too, and ranks would then
            # continue with gradients that were never reduced.
            alone = place < len(group) and not self._skips
            with without_reduction(self.model) if alone else contextlib.nullcontext():
                reports.append(self._gradient(batch))
        kept = sum(not report.skipped for report in reports)
        if kept == 0:
            self.optimizer.zero_grad()  # no gradients are pending any more
            return reports, False
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        if kept > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(kept)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
            return reports, True
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return reports, self.scaler.get_scale() >= scale

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which `losses` is computed."""
        dtype = PRECISIONS[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    @property
    def _skips(self) -> bool:
        """Return whether a batch may be skipped."""
        optimizer = self.optimizer
        return isinstance(optimizer, ESAM) and optimizer.config.on_nonfinite == "skip"

    def _losses(self, *batch: Any) -> tuple[Tensor, Seen]:
        """Return the losses of a batch, or of the samples in one pass, and what metrics need."""
        with self.autocast():
            values, outputs = per_sample(self.losses(self.model, *batch))
        return values, Seen(values, outputs, batch)

    def _gradient(self, batch: Arguments) -> StepReport:
        """Add a batch's gradient to `.grad`: ESAM's, or that of the mean loss."""
        esam = self.optimizer if isinstance(self.optimizer, ESAM) else None
        if esam is not None:
            loss = esam.loss(self._losses, *batch)
        else:
            values, seen = self._losses(*Samples().bare((batch, {}))[0])
            loss = values.mean()
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        if esam is not None and esam.report is not None:
            return esam.report
        losses = values.detach()
        return StepReport(count=0, losses=losses, outputs=seen, batch_size=len(losses))


def with_precision(losses: ModelLosses, update: Update) -> Callable[..., Any]:
    """Return `losses` with the update's autocast precision, for an evaluation."""

    @functools.wraps(losses)
    def wrapper(model: nn.Module, *batch: Any) -> Any:
        with update.autocast():
            return losses(model, *batch)

    return wrapper
