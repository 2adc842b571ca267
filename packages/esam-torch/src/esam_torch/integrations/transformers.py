"""ESAM in Hugging Face's `Trainer`."""

import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from esam_core import ESAMTypeError, ESAMValueError, RunningMeans, StepReport
from esam_torch.integrations.model_losses import labels_of, losses_by_row, per_sample_losses
from esam_torch.integrations.row_losses import RowLosses
from esam_torch.losses import per_sample
from esam_torch.notes import note_errors
from esam_torch.optimizer import ESAM

__all__ = ["ESAMTrainer", "per_sample_losses"]


class ESAMTrainer(Trainer):
    """`Trainer` with ESAM around the optimizer that it creates or is given.

    Everything else is Trainer's: arguments, accumulation, clipping, mixed precision, schedules,
    several GPUs, checkpoints.

    The losses per sample are derived from the loss that Trainer would compute: the model's `.loss`,
    the loss with label smoothing, or `compute_loss_func`; see `per_sample_losses`. In the first
    training step their mean is compared with that loss. If it cannot be computed per sample,
    override `compute_losses`.

    Args:
        *args: as for `Trainer`.
        esam: keyword arguments of `ESAM`, such as `{"rho": 0.05, "gamma": 0.5}`. Default none.
        token_weighted: True: each token counts the same, as with `Trainer`. False (default): each
            sample counts the same, and its loss is the mean over its tokens.
        **kwargs: as for `Trainer`.

    Raises:
        ESAMTypeError: `esam` has keys that are not keyword arguments of `ESAM`, DeepSpeed is used,
            or a subclass overrides `compute_loss`: override `compute_losses` instead, or put the
            class that has it after `ESAMTrainer` in the bases.
        ESAMValueError: `esam` is given together with an optimizer that is an `ESAM`. Trainer would
            use several GPUs in one process. `token_weighted` with an overridden `compute_losses`
            or, in training, with a model that does not take `num_items_in_batch`.

    Example:
        `trainer = ESAMTrainer(model, arguments, train_dataset=data, esam={"rho": 0.05})`
    """

    def __init__(
        self,
        *args: Any,
        esam: Mapping[str, Any] | None = None,
        token_weighted: bool = False,
        **kwargs: Any,
    ) -> None:
        self._esam = _checked(esam)
        self._token_weighted = token_weighted
        self._unchecked = [True]  # a list, because attributes are the same in each pass of a step
        self._needs_outputs = True
        self._means = RunningMeans(("sharpness",))  # since it was last logged
        self._reported: StepReport | None = None
        super().__init__(*args, **kwargs)
        self._refuse_two_esams()
        # Whether we must divide by the number of accumulated batches, because Trainer does not.
        self.loss_is_scaled_for_ga = token_weighted
        if self.is_deepspeed_enabled:
            raise ESAMTypeError(
                "`args.deepspeed` must be None: DeepSpeed runs the updates itself, without the "
                "optimizer's step. Use DistributedDataParallel or FSDP2. Received: DeepSpeed."
            )
        if self.args.n_gpu > 1:  # copies would draw other random numbers in each pass
            raise ESAMValueError(
                "Trainer must use one GPU per process: start the script with torchrun, or show it "
                f"one GPU (CUDA_VISIBLE_DEVICES=0). Received: {self.args.n_gpu} GPUs in one "
                "process, which Trainer would use by DataParallel."
            )
        if token_weighted and not self._takes_own_losses():
            raise ESAMValueError(
                "`token_weighted` must be False if `compute_losses` is overridden, which can "
                "weight samples itself. Received: token_weighted=True."
            )
        if self.args.torch_compile and self._takes_own_losses():
            warnings.warn(_COMPILED, stacklevel=2)
        if type(self).compute_loss is not ESAMTrainer.compute_loss:
            raise ESAMTypeError(
                "`compute_losses` must be overridden instead of `compute_loss`: ESAM needs one "
                "loss per sample, (b,). Or derive from (ESAMTrainer, a Trainer with your "
                f"`compute_loss`). Received: a `compute_loss` of {type(self).__name__}."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap Trainer's optimizer in an `ESAM`, unless it already is one."""
        created = self.optimizer is None
        super().create_optimizer(*args, **kwargs)
        if created:
            self._refuse_two_esams()
        if _esam_in(self.optimizer) is None:
            base: Any = self.optimizer
            model: Any = self.model
            self.optimizer = ESAM(base, model, **self._esam)
        return self.optimizer

    def _refuse_two_esams(self) -> None:
        """Raise if the arguments of an `ESAM` are given, but also the `ESAM` itself."""
        if self._esam and _esam_in(self.optimizer) is not None:
            raise ESAMValueError(
                "`esam` must be None if the optimizer is an ESAM already, which has these "
                f"hyperparameters itself. Received: esam={self._esam}."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return ESAM's loss for a batch in training, and the mean loss in evaluation.

        In evaluation it is Trainer's own loss or, if `compute_losses` is overridden, its mean.
        """
        esam, training = _esam_in(self.optimizer), model.training and torch.is_grad_enabled()
        if esam is None and training and self.optimizer is not None:
            raise ESAMTypeError(
                "The optimizer must be an ESAM in training. A `create_optimizer` of your own must "
                "end with `return super().create_optimizer()`, which wraps `self.optimizer`. "
                f"Received: {type(self.optimizer).__name__}."
            )
        if esam is None or not training:
            if not self._takes_own_losses():
                needed = return_outputs and self._needs_outputs
                loss, outputs = self._mean_of_losses(model, inputs, needed=needed)
                return (loss, outputs) if return_outputs else loss
            return super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        self._update_means(esam)
        losses = self.compute_losses
        if self._takes_own_losses():
            size = len(labels_of(inputs, self.label_names)[0])
            items = self._items_per_sample(size, num_items_in_batch)
            losses = partial(self._own_losses, items_per_sample=items, batch_size=size)
        loss = esam.loss(partial(losses, model), inputs)
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluate a batch as Trainer does."""
        self._needs_outputs = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _mean_of_losses(self, model: nn.Module, inputs: Any, *, needed: bool) -> tuple[Tensor, Any]:
        """Return the mean of the overridden `compute_losses`, and the model's outputs."""
        seen: list[Any] = []
        hook = model.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            losses, outputs = per_sample(self.compute_losses(model, inputs))
        finally:
            hook.remove()
        loss = losses.mean()
        if outputs is None and len(seen) == 1:
            outputs = seen[0]
        if outputs is None and needed:
            raise ESAMValueError(
                "`compute_losses` must call `model` once, whose outputs are the predictions, or "
                "return (losses, outputs). Or set `prediction_loss_only=True` in the arguments. "
                f"Received: {len(seen)} calls, and losses only."
            )
        return loss, outputs if isinstance(outputs, dict) else _after_a_loss(outputs, loss)

    def compute_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Return one loss per sample, (b,). Default: Trainer's own loss, computed per sample.

        In evaluation, an overridden one is also called without gradients, with all samples. May
        return (losses, outputs), if the predictions are not the outputs of a single call of
        `model`.

        Args:
            model: the model, as wrapped by Trainer.
            inputs: the batch, or a part of it.
        """
        return self._own_losses(model, inputs)

    def _takes_own_losses(self) -> bool:
        """Return whether the losses are Trainer's own: `compute_losses` is not overridden."""
        return type(self).compute_losses is ESAMTrainer.compute_losses

    def _own_losses(self, model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Tensor:
        """Return Trainer's own loss per sample, (b,). Options are those of `RowLosses`."""
        labels = labels_of(inputs, self.label_names)
        rows = RowLosses(labels, **options, checking=bool(self._unchecked))
        losses = losses_by_row(lambda rows: self._mean_loss(model, inputs, rows), rows, model)
        if len(losses) > 1:  # one sample is always its own mean
            self._unchecked.clear()
        return losses

    def _mean_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], rows: RowLosses | None
    ) -> Any:
        """Return Trainer's own loss for a batch; per sample while `rows` are active."""
        smoother: Any = self.label_smoother
        if rows is not None and smoother is not None:
            rowwise: Any = _SmoothedRows(smoother, rows)
            self.label_smoother = rowwise
        try:
            with note_errors(_NO_ITEMS, TypeError, "'Tensor' and 'NoneType'"):
                return super().compute_loss(model, dict(inputs))
        finally:
            self.label_smoother = smoother

    def _items_per_sample(self, samples: int, items: Any) -> Any:
        """Return the divisor of a sample's sum over its tokens; None for its own number of tokens.

        Args:
            samples: the number of samples in the batch.
            items: the number of tokens in all accumulated batches (of all processes), or None.
        """
        if not self._token_weighted:
            return None
        if items is None:
            raise ESAMValueError(
                "`token_weighted` must be False for this model: Trainer counts tokens only for "
                "models that take `num_items_in_batch`. Received: token_weighted=True."
            )
        if self.args.average_tokens_across_devices:
            samples *= self.args.world_size  # like Trainer: gradients are averaged over processes
        return items / samples

    def _update_means(self, esam: ESAM) -> None:
        """Add the last step's report to the means, once."""
        if esam.report is not None and esam.report is not self._reported:
            self._reported = esam.report
            self._means.update(esam.report)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean sharpness since the last call, in addition to the loss."""
        esam = _esam_in(self.optimizer)
        if "loss" in logs and esam is not None:
            self._update_means(esam)
            logs = {**logs, **self._means.result()}
            self._means.reset()
        super().log(logs, *args, **kwargs)


_COMPILED = (
    "With `torch_compile=True` and the model's own loss, each step compiles the model again, until "
    "the compiler gives up. Override `ESAMTrainer.compute_losses` so that the model computes only "
    "its outputs: they are compiled once for each kind of pass."
)

_NO_ITEMS = (
    "`num_items_in_batch` is None here, because it is not known how it is used. Without it, return "
    "a mean; with `token_weighted=True`, each token counts the same. Or override "
    "`ESAMTrainer.compute_losses`: it must return one loss per sample, (b,)."
)


def _checked(esam: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keyword arguments for `ESAM`, after checking their names."""
    if esam is not None and not isinstance(esam, Mapping):
        raise ESAMTypeError(
            "`esam` must be a dictionary of keyword arguments of ESAM, such as "
            f"{{'rho': 0.05}}. Received: esam={esam!r}."
        )
    own = inspect.signature(ESAM.__init__).parameters.values()
    known = [p.name for p in own if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in esam or {} if name not in known]
    if unknown:
        raise ESAMTypeError(
            f"The keys of `esam` must be keyword arguments of ESAM: {', '.join(known)}. "
            f"Received: {', '.join(map(repr, unknown))}."
        )
    return dict(esam or {})


def _esam_in(optimizer: Any) -> ESAM | None:
    """Return the `ESAM` that an optimizer is or wraps, as Accelerate's wrappers do; else None."""
    while optimizer is not None and not isinstance(optimizer, ESAM):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _after_a_loss(outputs: Any, loss: Tensor) -> tuple[Any, ...]:
    """Return a model's outputs as a tuple that begins with a loss, which Trainer drops."""
    parts = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
    first = parts[0] if parts else None
    has_loss = isinstance(first, Tensor) and first.dim() == 0
    return parts if has_loss else (loss, *parts)


class _SmoothedRows:
    """Trainer's `LabelSmoother`, applied to each sample separately.

    Args:
        smoother: Trainer's smoother.
        rows: determines the divisor of a sample's sum.
    """

    def __init__(self, smoother: Any, rows: RowLosses) -> None:
        self._smoother = smoother
        self._rows = rows

    def __call__(
        self, outputs: Any, labels: Tensor, shift_labels: bool = False, **_: Any
    ) -> Tensor:
        """Return one smoothed loss per sample, (b,)."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        counted = (labels[..., 1:] if shift_labels else labels) != self._smoother.ignore_index
        counts = counted.reshape(len(labels), -1).sum(1)

        def smooth(i: int, j: int, **options: Any) -> Tensor:
            part = {"logits": logits[i:j]}
            loss: Tensor = self._smoother(part, labels[i:j], shift_labels, **options)
            return loss

        sums = [smooth(i, i + 1, num_items_in_batch=1) for i in range(len(labels))]
        return self._rows.means(torch.stack(sums), counts, lambda: smooth(0, len(labels)))
