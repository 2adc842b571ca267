"""One loss per sample of the models of Hugging Face's transformers, from their own loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from esam_core import ESAMValueError
from esam_torch.guards import RandomState
from esam_torch.integrations.row_losses import RowLosses
from esam_torch.units import bare_model

__all__ = ["MeanLoss", "check_mean", "labels_of", "losses_by_row", "per_sample_losses"]

#: Returns the mean loss of a batch; while the `RowLosses` are active, where there are any.
MeanLoss = Callable[[RowLosses | None], Any]

_WAY_OUT = "Override `ESAMTrainer.compute_losses`: it must return one loss per sample, (b,)."


def per_sample_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    items_per_sample: float | Tensor | None = None,
    label_names: Sequence[str] | None = None,
) -> Tensor:
    """Return the model's own loss of each sample, (b,).

    The model is called once, with the batch, and computes its loss as ever: with its
    `loss_function`, its labels shifted or not, its `config.problem_type`. Only the means that it
    takes over the labels are taken per sample. What else it adds (a router's auxiliary loss) is
    added to each sample's loss. The mean over the samples is the model's `.loss`, but each sample
    counts the same, whatever the number of its tokens.

    Args:
        model: a model of transformers, or what wraps one (PEFT, DistributedDataParallel).
        inputs: the batch: keyword arguments of the model, among them the labels.
        items_per_sample: None (default): a sample's loss is the mean over its own tokens. A number:
            it is the sum over them, divided by this number. With the batch's mean number of tokens
            per sample, each token counts the same, as it does with Trainer.
        label_names: which inputs are labels. Default: those that transformers takes for labels.

    Raises:
        ESAMValueError: the batch has no labels, or the model's loss cannot be taken per sample.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))
        >>> tokens = torch.randint(40, (4, 10))
        >>> per_sample_losses(model, {"input_ids": tokens, "labels": tokens}).shape
        torch.Size([4])
    """
    if label_names is None:
        inner: Any = bare_model(model)
        if hasattr(inner, "get_base_model"):  # PEFT's
            inner = inner.get_base_model()
        label_names = find_labels(type(inner))  # type: ignore[no-untyped-call]
    rows = RowLosses(labels_of(inputs, label_names), items_per_sample=items_per_sample)

    def mean_loss(_: RowLosses | None) -> Any:
        outputs = model(**inputs)
        return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]

    return losses_by_row(mean_loss, rows, model)


def labels_of(inputs: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """Return the labels of a batch.

    Raises:
        ESAMValueError: there are none.
    """
    labels = [inputs[name] for name in names if isinstance(inputs.get(name), Tensor)]
    if not labels:
        raise ESAMValueError(
            f"The batch must hold labels, as tensors, under one of the names {list(names)}. "
            f"{_WAY_OUT} Received: {sorted(inputs)}."
        )
    return labels


def losses_by_row(mean_loss: MeanLoss, rows: RowLosses, model: nn.Module) -> Tensor:
    """Return one loss per sample, (b,), from a function that returns the mean loss of a batch.

    Raises:
        ESAMValueError: it computes it in a way that cannot be taken per sample.
    """
    with rows:
        found = mean_loss(rows)
    if isinstance(found, Tensor) and found.dim() == 0 and rows.samples == 1:
        return found[None]  # one sample's loss, however it is computed
    if not isinstance(found, Tensor) or found.shape != (rows.samples,):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ESAMValueError(
            f"The loss of {_name(model)} cannot be taken per sample: it is not made of torch's "
            f"loss functions on the labels. {_WAY_OUT} Received: a loss of {what} for "
            f"{rows.samples} samples."
        )
    return found


def check_mean(mean_loss: MeanLoss, labels: Sequence[Tensor], model: nn.Module) -> None:
    """Refuse losses per sample whose mean is not the mean loss.

    Samples are weighted by their tokens here, so that the two must be equal. Two forwards in
    evaluation mode; modes and random numbers are left as they were.

    Raises:
        ESAMValueError: they differ, or the losses cannot be taken per sample.
    """
    training = [module for module in model.modules() if module.training]
    state = RandomState(p.device for p in model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            own = mean_loss(None)
            state.restore()
            try:
                mean = losses_by_row(mean_loss, RowLosses(labels, exact=True), model).mean()
            except ESAMValueError:
                raise
            except Exception as error:
                raise ESAMValueError(
                    f"The loss of {_name(model)} cannot be taken per sample: its code does not "
                    f"work with a loss of shape (b,). {_WAY_OUT} "
                    f"Received: {type(error).__name__}: {error}"
                ) from error
    finally:
        for module in training:
            module.training = True
        state.restore()
    # The same numbers, added up in another order: 1e-4 holds for a million of them in float32, and
    # a mean in half precision is rounded to its own spacing.
    tolerance = max(1e-4, 4 * torch.finfo(own.dtype).eps)
    if not torch.allclose(mean.float(), own.float(), rtol=tolerance, atol=1e-6, equal_nan=True):
        raise ESAMValueError(
            f"The mean of the losses per sample must be the loss of {_name(model)}. {_WAY_OUT} "
            f"Received: {float(mean):.6g} and {float(own):.6g}."
        )


def _name(model: nn.Module) -> str:
    """Return the name of a model's class, for messages."""
    return type(bare_model(model)).__name__
