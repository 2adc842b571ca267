"""One loss a sample, out of a compiled loss that only gives their mean.

A factor f_i = 1 for each sample is multiplied into the loss; the derivative of the total by f_i is
then what sample i adds to it, and b times that is l_i: exactly for every loss that is linear in
the factor. Where the factor goes in is a *route*:

- "values": into what a compiled `keras.losses.Loss` returns before its reduction. Linear for every
  reduction, with masks, `sample_weight`, `loss_weights` and several outputs.
- "weights": into `sample_weight`, for a `compute_loss` of the user's own. Whether the result is
  linear is tried out once, before the first step, by `find_route`.
- None: the loss has no value a sample; only steps that keep every sample can use it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src.backend import get_keras_mask, set_keras_mask

from esam_core import ESAMValueError

__all__ = ["Batch", "check_scalar", "find_route", "weighted"]

Tensor = Any
#: (x, y, sample_weight) as Keras unpacks them.
Batch = tuple[Any, Any, Any]

_ADVICE = (
    "Without one, no sample can be selected: use gamma=1.0, which keeps them all, or a loss with "
    "a value a sample."
)


def compiled_losses(model: keras.Model) -> list[Any]:
    """Return the `Loss` objects of a compiled model, each once; they are built when first used."""
    compiled = model._compile_loss
    flat = [] if compiled is None else compiled._flat_losses or []
    return list({id(part.loss): part.loss for part in flat}.values())


def has_own_compute_loss(model: keras.Model) -> bool:
    """Say whether the model brings a `compute_loss` of its own."""
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
        losses = compiled_losses(model)
        for loss in losses:
            vars(loss)["call"] = _weighted_call(loss, factor)
        try:
            yield batch
        finally:
            for loss in losses:
                vars(loss).pop("call", None)


def _weighted_call(loss: Any, factor: Tensor) -> Any:
    """Return the loss's `call`, with its values multiplied by the factors of their samples."""
    original = loss.call

    def call(y_true: Any, y_pred: Any) -> Tensor:
        values = original(y_true, y_pred)
        _check_values(loss.name, values, factor)
        result = values * ops.cast(_expanded(factor, len(values.shape)), values.dtype)
        mask = get_keras_mask(values)
        if mask is not None:
            set_keras_mask(result, mask)
        return result

    return call


def _check_values(name: str, values: Tensor, factor: Tensor) -> None:
    """Raise if a loss's values do not have the batch as their first axis."""
    shape, b = tuple(values.shape), factor.shape[0]
    if shape and (shape[0] is None or b is None or shape[0] == b):
        return
    raise ESAMValueError(
        f"The loss '{name}' must have a value for each sample before it is reduced, with shape "
        f"({'b' if b is None else b}, ...). Received: values of shape {shape}. {_ADVICE}"
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


# -- the choice of the route -----------------------------------------------------------------------


def find_route(model: keras.Model, needed: bool, total: Any) -> str | None:
    """Return the route for a model's loss, trying it out where it is not a plain Keras loss.

    Args:
        model: compiled, its loss built.
        needed: whether the step must tell samples apart.
        total: function of (route, factors) that returns the total loss of a few samples as a
            float; factors is a (n,) array.

    Raises:
        ESAMValueError: samples must be told apart and cannot be.
    """
    plain = all(
        type(loss).__call__ is keras.losses.Loss.__call__ for loss in compiled_losses(model)
    )
    if not has_own_compute_loss(model):
        if model._compile_loss is None:
            return None  # what `add_loss` brings has no value a sample
        if plain:
            return "values" if needed or _all_have_values(total) else None
    reasons = []
    for route in ("values", "weights"):
        if route == "values" and not (compiled_losses(model) and plain):
            continue
        problem = _problem(total, route)
        if problem is None:
            return route
        reasons.append(problem)
    if not needed:
        return None
    raise ESAMValueError(
        f"The loss must be linear in `sample_weight` for ESAM to know each sample's share of it. "
        f"Received: a loss that {reasons[-1] if reasons else 'has no value a sample'}. {_ADVICE}"
    )


#: How many samples are tried: few, so that it costs nothing.
TRIED = 4


def _all_have_values(total: Any) -> bool:
    """Say whether the compiled losses have a value a sample."""
    try:
        total("values", np.ones(TRIED, dtype=np.float32))
    except ESAMValueError:
        return False
    return True


def _problem(total: Any, route: str) -> str | None:
    """Return what is wrong with a route, or None: the loss must be affine in every factor."""
    n = TRIED
    try:
        zero = total(route, np.zeros(n, dtype=np.float32))
        alone = [total(route, np.eye(n, dtype=np.float32)[i]) - zero for i in range(n)]
        mixed = np.array([0.5, 4.0, 2.0, 0.25], dtype=np.float32)
        together = total(route, mixed) - zero
    except ESAMValueError as error:
        return f"has no value a sample ({error})"
    noise = 1e-5 * (abs(zero) + abs(together))
    size = max(map(abs, (*alone, together)))
    if size <= noise:
        return "does not depend on `sample_weight`"
    if abs(float(np.dot(mixed, alone)) - together) > 1e-3 * size + noise:
        return "is not linear in `sample_weight`"
    return None
