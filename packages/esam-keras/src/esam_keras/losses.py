"""One loss per sample, from a compiled loss that only returns their mean.

Each sample's loss is multiplied by a factor f_i = 1. The derivative of the total loss with respect
to f_i is the contribution of sample i, and b times this is l_i, exactly for every loss that is
linear in the factor. The place of the factor is called a *route*:

- "values": the values of a compiled `keras.losses.Loss` before its reduction. Linear for every
  reduction, with masks, `sample_weight`, `loss_weights` and several outputs.
- "weights": the `sample_weight`, for the user's own `compute_loss`. Whether the result is linear is
  tested once, before the first step; see `esam_keras.routes`.
- None: there are no losses per sample; only steps that use all samples can work.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops, tree

from esam_core import ESAMValueError
from esam_keras import compat
from esam_keras.methods import replace_methods

__all__ = ["ADVICE", "Batch", "check_added_losses", "check_scalar", "weigh_samples"]

Tensor = Any
#: (x, y, sample_weight) as Keras unpacks them.
Batch = tuple[Any, Any, Any]

ADVICE = (
    "Without one loss per sample, no samples can be selected: use gamma=1.0 without "
    "ascend=Part(...), so that steps use the whole batch, or a loss with one value per sample."
)


def check_scalar(loss: Tensor) -> None:
    """Raise if a total loss is not one number."""
    if len(loss.shape) > 0:
        raise ESAMValueError(
            "The compiled loss must be one number, so that it has a gradient. Received: a loss of "
            f"shape {tuple(loss.shape)}. Use a reduction such as 'sum_over_batch_size'."
        )


def check_added_losses(losses: Sequence[Tensor]) -> None:
    """Raise if a layer has added several numbers, of which Keras takes the sum.

    A sum over some samples has another size than that over the batch.

    Args:
        losses: what layers have added in a pass on some samples, without regularisation of weights.
    """
    for loss in losses:
        if len(loss.shape) > 0:
            raise ESAMValueError(
                "`add_loss` must get one number, the mean over the samples, where steps run the "
                "model on some samples only: Keras takes the sum of several numbers. Add the mean, "
                "or use gamma=1.0 without ascend=Part(...). Received: a loss of shape "
                f"{tuple(loss.shape)}."
            )


@contextmanager
def weigh_samples(
    model: keras.Model,
    route: str | None,
    batch: Batch,
    factor: Tensor | None,
    *,
    repeated: bool = False,
) -> Iterator[Batch]:
    """Yield a batch for the loss, with sample i weighted by factor_i.

    Args:
        model: a compiled model.
        route: see the module.
        batch: the whole batch.
        factor: (b,), or None for 1.
        repeated: whether the predictions for samples with the factor 0 are those of others; the
            values need not be finite there.
    """
    if factor is None or route is None:
        yield batch
    elif route == "weights":
        x, y, sample_weight = batch
        yield x, y, _times_weights(sample_weight, factor)
    else:
        losses = compat.compiled_losses(model)
        weighed = [(loss, "call", _weigh_values(loss, factor, repeated)) for loss in losses]
        with replace_methods(weighed):
            yield batch


def _weigh_values(loss: Any, factor: Tensor, repeated: bool) -> Any:
    """Return the loss's `call`, with its values multiplied by the samples' factors."""
    original = loss.call

    def call(y_true: Any, y_pred: Any) -> Tensor:
        values = original(y_true, y_pred)
        _check_values(loss.name, values, factor)
        _check_masks(loss.name, y_pred, values)
        factors = ops.cast(_expand(factor, len(values.shape)), values.dtype)
        result = values * factors
        if repeated:
            result = ops.where(factors == 0, ops.zeros_like(result), result)
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


def _check_masks(name: str, y_pred: Any, values: Tensor) -> None:
    """Raise if Keras cannot combine the masks of predictions and values.

    Predictions that are repeated have masks of numbers; see `esam_keras.rows`.
    """
    masks = [mask for mask in compat.masks_of(y_pred) if mask is not None]
    numbers = [mask for mask in masks if "float" in keras.backend.standardize_dtype(mask.dtype)]
    if numbers and compat.masks_of(values) != [None]:
        raise ESAMValueError(
            f"The loss '{name}' has a mask of its own, such as with `ignore_class`, and the "
            "predictions have one too. Then the ascent pass needs the whole batch: use "
            "ascend=Batch(). Received: an ascent direction without it."
        )


def _expand(factor: Tensor, rank: int) -> Tensor:
    """Return (b,) factors reshaped to (b, 1, ..., 1)."""
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
    return weight * _expand(factor, len(weight.shape))
