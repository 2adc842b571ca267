"""ESAM in PyTorch Lightning, under its automatic optimization."""

from typing import Any

from torch import Tensor

from esam_core import ESAMTypeError, StepReport
from esam_torch.fitting.data import arguments
from esam_torch.optimizer import ESAM

__all__ = ["ESAMMixin"]


class ESAMMixin:
    """A mixin with a `training_step` for ESAM and its logging. Put it before `LightningModule`.

    Write `losses` instead of `training_step`, and return an `ESAM` from `configure_optimizers`.
    "train_loss" is logged, and "sharpness" in steps that compute it. The mixin saves four lines:
    your own `training_step` that returns `self.optimizers().loss(self.losses, *batch)` trains the
    same way.

    Example:
        >>> import lightning
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from esam_torch import ESAM
        >>> class Classifier(ESAMMixin, lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 3)
        ...     def forward(self, inputs):
        ...         return self.layer(inputs)
        ...     def losses(self, inputs, targets):
        ...         return F.cross_entropy(self(inputs), targets, reduction="none")
        ...     def configure_optimizers(self):
        ...         return ESAM(torch.optim.SGD(self.parameters(), lr=0.1), self, rho=0.05)
    """

    def losses(self, *batch: Any) -> Any:
        """Return one loss per sample, (b,), or (losses, outputs), for a batch.

        A tuple or list is passed as several arguments, any other batch as one.
        """
        raise ESAMTypeError(f"{type(self).__name__} must have a method `losses`.")

    @property
    def report(self) -> StepReport | None:
        """The report of the last step; None before the first."""
        return self._esam().report

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return ESAM's loss for a batch."""
        return self._esam().loss(self.losses, *arguments(batch))

    def on_after_backward(self) -> None:
        """Log the loss and, if the step computed it, the sharpness."""
        report = self.report
        if report is None:
            return
        log: Any = self.log  # type: ignore[attr-defined]
        for name, value in (("train_loss", report.loss), ("sharpness", report.sharpness)):
            if value is not None:
                log(name, value, prog_bar=True, batch_size=report.batch_size)

    def _esam(self) -> ESAM:
        """Return the module's only optimizer."""
        optimizer = self.optimizers()  # type: ignore[attr-defined]
        if not isinstance(optimizer, ESAM):
            several = isinstance(optimizer, list)
            what = f"{len(optimizer)} optimizers" if several else type(optimizer).__name__
            raise ESAMTypeError(
                "`configure_optimizers` must return one ESAM. With several optimizers, write "
                f"`training_step` yourself, with manual optimization. Received: {what}."
            )
        return optimizer
