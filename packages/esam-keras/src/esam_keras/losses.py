"""One loss a sample, out of a compiled loss that only gives their mean.

A factor f_i = 1 for each sample is multiplied into the loss; the derivative of the total by f_i is
then what sample i adds to it, and b times that is l_i: exactly for every loss that is linear in
the factor. Where the factor goes in is a *route*:

- "values": into what a compiled `keras.losses.Loss` returns before its reduction. Linear for every
  reduction, with masks, `sample_weight`, `loss_weights` and several outputs.
- "weights": into `sample_weight`, for a `compute_loss` of the user's own. Whether the result is
  linear is tried out once, before the first step: see `esam_keras.routes`.
- None: the loss has no value a sample; only steps that keep every sample can use it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops, tree

from esam_core import ESAMValueError
from esam_keras import compat

__all__ = ["ADVICE", "Batch", "check_scalar", "has_own_compute_loss", "weighted"]

Tensor = Any
#: (x, y, sample_weight) as Keras unpacks them.
Batch = tuple[Any, Any, Any]

ADVICE = (
    "Without one, samples cannot be told apart: use gamma=1.0 and no ascend=Part(...), which take "
    "the whole batch, or a loss with a value a sample."
)


def has_own_compute_loss(model: keras.Model) -> bool:
    """Return whether the model brings a `compute_loss` of its own."""
    own = "compute_loss" in vars(model)
    return own or type(model).compute_loss is not keras.Model.compute_loss


def check_scalar(loss: Tensor) -> None:
    """Raise if a total loss is not one number."""
    if len(loss.shape) > 0:
        raise ESAMValueError(
            "The compiled loss must be one number, so that it has a gradient. Received: a loss of "
            f"shape {tuple(loss.shape)}. Use a reduction such as 'sum_over_batch_size'."
        )


@contextmanager
def weighted(
    model: keras.Model, route: str | None, batch: Batch, factor: Tensor | None
) -> Iterator[Batch]:
    """Yield a batch to compute the loss of, in which sample i counts factor_i-fold.

    Args:
        model: compiled.
        route: see the module.
        batch: the whole batch.
        factor: (b,), or None for 1.
    """
    if factor is None or route is None:
        yield batch
    elif route == "weights":
        x, y, sample_weight = batch
        yield x, y, _times_weights(sample_weight, factor)
    else:
        losses = compat.compiled_losses(model)
        with compat.calls_replaced([(loss, _weighted_call(loss, factor)) for loss in losses]):
            yield batch


def _weighted_call(loss: Any, factor: Tensor) -> Any:
    """Return the loss's `call`, with its values multiplied by the factors of their samples."""
    original = loss.call

    def call(y_true: Any, y_pred: Any) -> Tensor:
        values = original(y_true, y_pred)
        _check_values(loss.name, values, factor)
        result = values * ops.cast(_expanded(factor, len(values.shape)), values.dtype)
        return compat.with_masks(result, compat.masks_of(values))

    return call


def _check_values(name: str, values: Tensor, factor: Tensor) -> None:
    """Raise if a loss's values do not have the batch as their first axis."""
    # A loss function may return a number.
    shape, b = tuple(getattr(values, "shape", ())), factor.shape[0]
    if shape and (shape[0] is None or b is None or shape[0] == b):
        return
    raise ESAMValueError(
        f"The loss '{name}' must have a value for each sample before it is reduced, with shape "
        f"({'b' if b is None else b}, ...). Received: values of shape {shape}. {ADVICE}"
    )


def _expanded(factor: Tensor, rank: int) -> Tensor:
    """Return (b,) factors with shape (b, 1, ..., 1)."""
    return ops.reshape(factor, (-1, *(1,) * (rank - 1)))


def _times_weights(sample_weight: Any, factor: Tensor) -> Any:
    """Return sample weights, or a structure of them, times the factors."""
    if sample_weight is None:
        return factor
    return tree.map_structure(
        lambda w: None if w is None else _times(w, factor),
        sample_weight,
    )


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """Return one tensor of sample weights times the factors."""
    weight = ops.cast(weight, factor.dtype)
    return weight * _expanded(factor, len(weight.shape))
