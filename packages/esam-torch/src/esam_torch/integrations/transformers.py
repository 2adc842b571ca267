"""ESAM in Hugging Face's `Trainer`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from esam_core import ESAMValueError
from esam_torch.integrations.accelerate import descending, esam_in
from esam_torch.optimizer import ESAM
from esam_torch.units import bare_model

__all__ = ["ESAMTrainer", "per_sample_losses"]

_IGNORED = -100  # the label of tokens that do not count, in every model of the library


def per_sample_losses(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return one loss a sample from a model's logits and the batch's labels.

    Classes: cross-entropy. One number: squared error. Several yes/no labels: their mean binary
    cross-entropy. Tokens: the mean cross-entropy of the sample's own tokens, so that each sample
    counts the same, whatever its length.

    Args:
        model: a model of the library, called with the batch.
        inputs: the batch, with "labels".

    Raises:
        ESAMValueError: there are no labels, or none of the above fits.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        raise ESAMValueError(
            'The batch must hold "labels"; else override ESAMTrainer.per_sample_losses. '
            f"Received: {sorted(inputs)}."
        )
    outputs = model(**inputs)
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
    logits = logits.float()
    if not labels.is_floating_point():
        if labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] > 1:
            return F.cross_entropy(logits, labels, reduction="none")
        if labels.dim() == 2 and logits.dim() == 3:
            if type(bare_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
                logits, labels = logits[:, :-1], labels[:, 1:]
            values = F.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
            )
            return values.sum(1) / (labels != _IGNORED).sum(1).clamp_min(1)
    elif labels.shape == logits.shape and labels.dim() == 2 and labels.shape[1] > 1:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    elif labels.numel() == logits.numel() == len(labels):
        return F.mse_loss(logits.reshape(-1), labels.reshape(-1).float(), reduction="none")
    raise ESAMValueError(
        "ESAMTrainer.per_sample_losses must be overridden for this model. Received: logits of "
        f"shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}."
    )


class ESAMTrainer(Trainer):
    """`Trainer` with ESAM around whatever optimizer it makes or is given.

    Everything else is the Trainer's: arguments, accumulation, clipping, mixed precision,
    schedules, several GPUs, checkpoints.

    Args:
        *args: as for `Trainer`.
        esam: keyword arguments of `ESAM`, such as `{"rho": 0.05, "gamma": 0.5}`. Default none.
        **kwargs: as for `Trainer`.

    Override `per_sample_losses` where the one for labels and logits does not fit. Differs from
    `Trainer`: losses are averaged over samples and not over tokens, and the sharpness is logged.

    Example:
        `trainer = ESAMTrainer(model, arguments, train_dataset=data, esam={"rho": 0.05})`
    """

    def __init__(self, *args: Any, esam: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._esam = dict(esam or {})
        self._sharpness: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the Trainer's optimizer in an `ESAM`."""
        super().create_optimizer(*args, **kwargs)
        base: Any = self.optimizer
        model: Any = self.model
        if not isinstance(base, ESAM):
            self.optimizer = ESAM(base, model, **self._esam)
        return self.optimizer

    def per_sample_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Return one loss a sample, (b,). Default: `per_sample_losses` of this module."""
        return per_sample_losses(model, inputs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Add ESAM's gradient of a batch; return its mean loss."""
        model.train()
        esam = esam_in(self.optimizer)
        esam.train()
        esam.model, esam.scaler = model, self.accelerator.scaler
        inputs = self._prepare_inputs(inputs)
        whole: Any = getattr(self, "current_gradient_accumulation_steps", None)
        micro_batches = whole or self.args.gradient_accumulation_steps

        def losses(batch: Mapping[str, Any]) -> Any:
            with self.compute_loss_context_manager():
                return self.per_sample_losses(model, batch)

        def descend(total: Tensor) -> None:
            self.accelerator.backward(total / micro_batches)

        with descending(esam, descend):
            report = esam.backward(losses, inputs)
        if report.sharpness is not None:
            self._sharpness.append(report.sharpness)
        loss: Tensor = report.loss / micro_batches
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean sharpness since the last time, beside the loss."""
        if "loss" in logs and self._sharpness:
            total = sum(float(value) for value in self._sharpness)
            logs = {**logs, "sharpness": total / len(self._sharpness)}
            self._sharpness.clear()
        super().log(logs, *args, **kwargs)
