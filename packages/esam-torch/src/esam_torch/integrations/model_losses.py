"""One loss per sample for models of Hugging Face's transformers, from the model's own loss."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from esam_core import ESAMValueError
from esam_torch.integrations.row_losses import RowLosses
from esam_torch.wrappers import bare_model

__all__ = ["MeanLoss", "labels_of", "losses_by_row", "per_sample_losses"]

#: Returns the mean loss of a batch, under `RowLosses` if they are given.
MeanLoss = Callable[[RowLosses | None], Any]

#: The models whose losses per sample have been compared with their own loss.
_CHECKED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

_WAY_OUT = (
    "Write a function that returns one loss per sample, (b,); with `ESAMTrainer`, override "
    "`compute_losses`."
)


def per_sample_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    items_per_sample: float | Tensor | None = None,
    label_names: Sequence[str] | None = None,
) -> Tensor:
    """Return the model's own loss of each sample, (b,).

    The model is called once with the batch and computes its loss as usual: with its
    `loss_function`, shifted labels if it shifts them, and its `config.problem_type`. Only the means
    over the labels are computed per sample. Anything else that it adds (a router's auxiliary loss)
    is added to each sample's loss. The mean over the samples is the model's `.loss`, except that
    each sample counts the same, whatever its number of tokens. For a loss that is a sum over the
    batch (CTC's, by default), the mean is that sum divided by b.

    In the first call for a model, the mean is compared with the model's `.loss`.

    Args:
        model: a model of transformers, or a wrapper of one (PEFT, DistributedDataParallel).
        inputs: the batch: keyword arguments of the model, including the labels.
        items_per_sample: None (default): a sample's loss is the mean over its own tokens. A number:
            the sum over its tokens divided by this number. If it is the batch's mean number of
            tokens per sample, each token counts the same, as with Trainer.
        label_names: which inputs are labels. Default: as transformers determines them.

    Raises:
        ESAMValueError: the batch has no labels, the model's loss cannot be computed per sample, or
            its mean differs from the model's loss.

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
    checking = model not in _CHECKED
    rows = RowLosses(
        labels_of(inputs, label_names), items_per_sample=items_per_sample, checking=checking
    )

    def mean_loss(_: RowLosses | None) -> Any:
        outputs = model(**inputs)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        loss = getattr(outputs, "loss", None) if loss is None else loss
        return outputs[0] if loss is None else loss

    losses = losses_by_row(mean_loss, rows, model)
    if len(losses) > 1:  # one sample is always its own mean
        _CHECKED.add(model)
    return losses


def labels_of(inputs: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """Return the labels of a batch.

    Raises:
        ESAMValueError: there are none.
    """
    labels = [inputs[name] for name in names if isinstance(inputs.get(name), Tensor)]
    if not labels:
        raise ESAMValueError(
            f"The batch must contain labels, as tensors, under one of the names {list(names)}. "
            f"{_WAY_OUT} Received: {sorted(inputs)}."
        )
    return labels


def losses_by_row(mean_loss: MeanLoss, rows: RowLosses, model: nn.Module) -> Tensor:
    """Return one loss per sample, (b,), using a function that returns the mean loss of a batch.

    Raises:
        ESAMValueError: the loss cannot be computed per sample.
    """
    name = type(bare_model(model)).__name__
    try:
        with rows:
            found = mean_loss(rows)
        return rows.check(found, name)
    except ESAMValueError as error:
        raise ESAMValueError(f"{error} {_WAY_OUT}") from error
    except Exception as error:
        ours = rows.checking and not isinstance(error, torch.OutOfMemoryError)
        if not (ours and _works(mean_loss)):
            raise
        raise ESAMValueError(
            f"The loss of {name} cannot be computed per sample: its code does not work with one "
            f"loss per sample. Received: {type(error).__name__}: {error}. {_WAY_OUT}"
        ) from error


def _works(mean_loss: MeanLoss) -> bool:
    """Return whether the loss of the batch can be computed: batch and model are valid."""
    try:
        mean_loss(None)
    except Exception:
        return False
    return True
