"""One update: a batch, or several whose gradients add up, and the base optimizer's step."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esam_core import StepReport
from esam_torch.fitting.data import Arguments
from esam_torch.fitting.measures import ModelLosses
from esam_torch.losses import per_sample
from esam_torch.optimizer import ESAM
from esam_torch.synchronisation import unsynchronised

__all__ = ["Update"]

#: What autocast computes in, by the name of the precision.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Update:
    """Makes updates of a model.

    Args:
        model: what is trained, wrapped as it is called.
        optimizer: an `ESAM` or another optimizer.
        losses: a function of the model and a batch.
        device: where the model is.
        precision: "fp32", "bf16" or "fp16": what `losses` is computed in, by autocast.
        scaler: the gradient scaler of fp16, or None.
        clip_norm: the largest norm of the gradient, or None.
        clip_value: the largest absolute value in the gradient, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: ModelLosses
    device: torch.device
    precision: str = "fp32"
    scaler: Any = None
    clip_norm: float | None = None
    clip_value: float | None = None

    def __call__(self, group: Sequence[Arguments]) -> tuple[list[StepReport], bool]:
        """Make one update with the mean gradient of a group of batches.

        Returns:
            A report for each batch, and whether the optimizer made its step: a scaler leaves it
            out where a gradient was not finite, and there is none where every batch was skipped.
        """
        self.optimizer.zero_grad()
        reports = []
        for place, batch in enumerate(group, 1):
            # Ranks add their gradients up once, with the last batch; with each where any may be
            # skipped, the last one too: ranks would go on with gradients that they had never added.
            alone = place < len(group) and not self._skips
            with unsynchronised(self.model) if alone else contextlib.nullcontext():
                reports.append(self._gradient(batch))
        kept = sum(not report.skipped for report in reports)
        if kept == 0:
            self.optimizer.zero_grad()  # nothing waits for a step any more
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
        """Return whether a batch may be left out."""
        optimizer = self.optimizer
        return isinstance(optimizer, ESAM) and optimizer.config.on_nonfinite == "skip"

    def _losses(self, *batch: Any) -> Any:
        """Return what the user's function returns for a batch."""
        with self.autocast():
            return self.losses(self.model, *batch)

    def _gradient(self, batch: Arguments) -> StepReport:
        """Add a batch's gradient to `.grad`: ESAM's, or that of the mean loss."""
        esam = self.optimizer if isinstance(self.optimizer, ESAM) else None
        if esam is not None:
            loss = esam.loss(self._losses, *batch)
        else:
            values, outputs = per_sample(self._losses(*batch))
            loss = values.mean()
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        if esam is not None and esam.report is not None:
            return esam.report
        return StepReport(count=0, losses=values.detach(), outputs=outputs)


def in_precision(losses: ModelLosses, update: Update) -> Callable[..., Any]:
    """Return `losses` as the update computes them, for an evaluation."""

    @functools.wraps(losses)
    def computed(model: nn.Module, *batch: Any) -> Any:
        with update.autocast():
            return losses(model, *batch)

    return computed
