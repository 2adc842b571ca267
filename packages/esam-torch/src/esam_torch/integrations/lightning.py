"""ESAM in PyTorch Lightning, under its automatic optimization."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from esam_core import ESAMTypeError, ESAMValueError, StepReport
from esam_torch.fitting.data import arguments
from esam_torch.integrations.accelerate import check_skipping, descending, esam_in
from esam_torch.optimizer import ESAM
from esam_torch.wrappers import bare_model

__all__ = ["ESAMMixin"]


class ESAMMixin:
    """Put before `LightningModule` in the bases: Lightning's own loop then trains with ESAM.

    Write `losses` in place of `training_step`, and return an `ESAM` from `configure_optimizers`.
    The Trainer's accumulation, clipping, precision, schedules, strategies and checkpoints work as
    ever. "train_loss" and "sharpness" are logged, and the last step's report is `self.report`.

    With DistributedDataParallel, ranks agree about what is not finite; then `on_nonfinite="skip"`
    is refused beside accumulation.

    The loss that `on_train_batch_end` gets is a placeholder: passes are run when Lightning calls
    `backward`, after it has asked for the loss.

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

    report: StepReport | None = None

    def losses(self, *batch: Any) -> Any:
        """Return one loss a sample, (b,), or (losses, outputs), of a batch.

        A batch that is a tuple or a list comes as several arguments, any other as one.
        """
        raise ESAMTypeError(f"{type(self).__name__} must have a method `losses`.")

    # -- hooks of LightningModule -----------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keep the batch, and return a 1 that comes back to `backward` as the loss's scale."""
        self._batch = arguments(batch)
        device: torch.device = self.device  # type: ignore[attr-defined]
        return torch.ones((), device=device, requires_grad=True)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run ESAM's passes; the descent's loss is scaled as Lightning has scaled the 1."""
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        if not hasattr(self, "_batch"):
            raise ESAMTypeError(
                "`training_step` must be ESAMMixin's, which comes before LightningModule in the "
                "bases: what it would return, one loss a sample, is what `losses` returns. "
                f"Received: a training_step of {type(self).__name__} that does not call it."
            )
        esam = _esam(trainer)
        check_skipping(esam, trainer.world_size, trainer.accumulate_grad_batches)
        replicas = _replicas(trainer, esam)
        precision = trainer.precision_plugin
        esam.scaler = getattr(precision, "scaler", None)
        scale = loss.detach()

        def losses(*batch: Any) -> Any:
            with precision.train_step_context():
                return self.losses(*batch)

        def descend(total: Tensor) -> None:
            loss = total * scale
            if (
                replicas is not None
                and replicas.find_unused_parameters
                and replicas.require_backward_grad_sync
            ):
                # It has looked at the placeholder, and takes every parameter for unused.
                replicas.reducer.prepare_for_backward([loss])
            torch.autograd.backward(loss)

        with descending(esam, descend):
            self.report = esam.backward(losses, *self._batch)
        del self._batch

    def on_after_backward(self) -> None:
        """Log the loss and the sharpness."""
        report: Any = self.report
        log: Any = self.log  # type: ignore[attr-defined]
        for name, value in (("train_loss", report.loss), ("sharpness", report.sharpness)):
            if value is not None:
                log(name, value, prog_bar=True, batch_size=len(report.losses))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let Lightning's closure go backward within the optimizer's step."""
        esam = _esam(self.trainer)  # type: ignore[attr-defined]
        esam._closures_go_backward = True
        try:
            super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            esam._closures_go_backward = False


def _esam(trainer: Any) -> ESAM:
    """Return the trainer's one optimizer."""
    if len(trainer.optimizers) != 1:
        raise ESAMTypeError(
            "`configure_optimizers` must return one ESAM (several base optimizers can be one). "
            f"Received: {len(trainer.optimizers)} optimizers."
        )
    return esam_in(trainer.optimizers[0])


def _replicas(trainer: Any, esam: ESAM) -> DistributedDataParallel | None:
    """Return what Lightning has wrapped the module in, if it trains replicas, and tell ESAM."""
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel):
        return None
    if esam.model is not model:
        if bare_model(esam.model) is bare_model(model):
            esam.model = model  # so that ranks agree about what is not finite
        elif esam.config.on_nonfinite != "propagate":
            raise ESAMValueError(
                "`model` of the ESAM must be the LightningModule itself where replicas must agree "
                f"about what is not finite, on_nonfinite={esam.config.on_nonfinite!r}. "
                f"Received: {type(bare_model(esam.model)).__name__}."
            )
    return model
