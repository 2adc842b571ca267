"""ESAM in Hugging Face's `Trainer`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from esam_core import ESAMTypeError, ESAMValueError, RunningMeans
from esam_torch.integrations.accelerate import check_skipping, descending, esam_in
from esam_torch.optimizer import ESAM
from esam_torch.units import bare_model

__all__ = ["ESAMTrainer", "per_sample_losses"]

_IGNORED = -100  # the label of tokens that do not count, in every model of the library


def per_sample_losses(
    model: nn.Module, inputs: Mapping[str, Any], *, label_smoothing: float = 0.0
) -> Tensor:
    """Return one loss a sample from a model's logits and the batch's labels.

    Classes: cross-entropy. One number: squared error. Several yes/no labels: their mean binary
    cross-entropy. Tokens: the mean cross-entropy of the sample's own tokens, so that each sample
    counts the same, whatever its length.

    Args:
        model: a model of the library, called with the batch.
        inputs: the batch, with "labels".
        label_smoothing: share of the target that is spread over all classes or tokens, in [0, 1).
            Default 0.

    Raises:
        ESAMValueError: there are no labels, or none of the above fits, or labels that are not
            classes or tokens are to be smoothed.
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
            return F.cross_entropy(
                logits, labels, label_smoothing=label_smoothing, reduction="none"
            )
        if labels.dim() == 2 and logits.dim() == 3:
            if type(bare_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
                logits, labels = logits[:, :-1], labels[:, 1:]
            values = F.cross_entropy(
                logits.transpose(1, 2),
                labels,
                ignore_index=_IGNORED,
                label_smoothing=label_smoothing,
                reduction="none",
            )
            return values.sum(1) / (labels != _IGNORED).sum(1).clamp_min(1)
    elif label_smoothing:
        raise ESAMValueError(
            "`label_smoothing_factor` must be 0 where labels are not classes or tokens. "
            f"Received: label_smoothing_factor={label_smoothing}."
        )
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

    Override `per_sample_losses` where the one for labels and logits does not fit; it has the place
    that `compute_loss` and `compute_loss_func` have with `Trainer`. Differs from `Trainer`: losses
    are averaged over samples and not over tokens, and the sharpness is logged.

    Raises:
        ESAMTypeError: a loss of one number is given, by `compute_loss_func` or by an overridden
            `compute_loss`, and `per_sample_losses` is not overridden.
        ESAMValueError: `label_smoothing_factor` is given and `per_sample_losses` overridden.

    Example:
        `trainer = ESAMTrainer(model, arguments, train_dataset=data, esam={"rho": 0.05})`
    """

    def __init__(self, *args: Any, esam: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._esam = dict(esam or {})
        self._means = RunningMeans(("sharpness",))  # since the last time that it was logged
        super().__init__(*args, **kwargs)
        self._check_losses()

    def _check_losses(self) -> None:
        """Refuse losses that the training would not use."""
        if type(self).per_sample_losses is not ESAMTrainer.per_sample_losses:
            if self.args.label_smoothing_factor:
                raise ESAMValueError(
                    "`label_smoothing_factor` must be 0 where `per_sample_losses` is overridden, "
                    "which can smooth labels itself. "
                    f"Received: label_smoothing_factor={self.args.label_smoothing_factor}."
                )
            return
        given = {
            "compute_loss_func": getattr(self, "compute_loss_func", None) is not None,
            "compute_loss": type(self).compute_loss is not Trainer.compute_loss,
        }
        for name, refused in given.items():
            if refused:
                raise ESAMTypeError(
                    "`per_sample_losses` must be overridden: ESAM needs one loss a sample, and "
                    f"`{name}` returns one a batch, which would be for evaluation alone. "
                    f"Received: `{name}` and no `per_sample_losses`."
                )

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
        smoother = self.label_smoother  # None for several yes/no labels, of which Trainer warns
        smoothing = 0.0 if smoother is None else float(smoother.epsilon)
        return per_sample_losses(model, inputs, label_smoothing=smoothing)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Add ESAM's gradient of a batch; return its mean loss."""
        model.train()
        esam = esam_in(self.optimizer)
        esam.train()
        esam.model, esam.scaler = model, self.accelerator.scaler
        inputs = self._prepare_inputs(inputs)
        whole: Any = getattr(self, "current_gradient_accumulation_steps", None)
        micro_batches = whole or self.args.gradient_accumulation_steps
        check_skipping(esam, self.args.world_size, self.args.gradient_accumulation_steps)

        def losses(batch: Mapping[str, Any]) -> Any:
            with self.compute_loss_context_manager():
                return self.per_sample_losses(model, batch)

        def descend(total: Tensor) -> None:
            self.accelerator.backward(total / micro_batches)

        with descending(esam, descend):
            report = esam.backward(losses, inputs)
        self._means.update(report)
        loss: Tensor = report.loss / micro_batches
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean sharpness since the last time, beside the loss."""
        if "loss" in logs:
            logs = {**logs, **self._means.result()}
            self._means.reset()
        super().log(logs, *args, **kwargs)
