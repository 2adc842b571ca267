"""Data selection on the device, in Keras operations; see `esam_core.selectors.select`."""

from dataclasses import dataclass
from typing import Any, cast

from keras import ops

from esam_core import selectors
from esam_keras.perturbation import wide_floatx

__all__ = ["Selected", "select", "subset_size"]

Tensor = Any


@dataclass(frozen=True)
class Selected:
    """(k,) ascending indices and (k,) weights w_i of the descent pass, in float32 or wider."""

    indices: Tensor
    weights: Tensor


def subset_size(gamma: float, b: int | Tensor) -> int | Tensor:
    """Return k = max(1, ceil(gamma b)), exactly; a tensor if b is only known at run time."""
    if isinstance(b, int):
        return selectors.subset_size(gamma, b)
    share = selectors.intended_fraction(gamma)
    wide = ops.cast(b, "int64")
    ceiling = (wide * share.numerator + (share.denominator - 1)) // share.denominator
    return ops.cast(ops.maximum(ceiling, 1), "int32")


def select(
    selector: selectors.Selector,
    losses: Tensor | None,
    perturbed_losses: Tensor | None,
    inputs: dict[str, Tensor],
    b: int | Tensor,
) -> Selected:
    """Return the samples that a selector selects.

    Args:
        selector: any selector of esam-core but `All`.
        losses: (b,) losses at theta, in float32 or wider; where the score needs none, of any
            samples, or None.
        perturbed_losses: (b,) losses at theta + epsilon, or None if its score does not need them.
        inputs: "indices" of a random subset or "offset" of a systematic sample, from the host;
            the offset is the sum of two numbers.
        b: the batch size.
    """
    k = subset_size(selector.gamma, b)
    if selector.rule == "random":
        dtype = wide_floatx() if losses is None else losses.dtype
        return Selected(inputs["indices"], _equal_weights(k, dtype))
    losses = cast(Tensor, losses)
    scores = losses if selector.score == "loss" else perturbed_losses - losses
    if selector.rule == "top":
        return Selected(_top(scores, k), _equal_weights(k, losses.dtype))
    floor = cast(selectors.Proportional, selector).floor  # there are only these four rules
    pi = _inclusion_probabilities(scores, k, b, floor)
    indices = _systematic(pi, k, b, inputs["offset"])
    weights = 1.0 / (ops.cast(b, pi.dtype) * ops.take(pi, indices, axis=0))
    return Selected(indices, weights)


def _equal_weights(k: int | Tensor, dtype: Any) -> Tensor:
    """Return the k weights 1/k."""
    number = ops.cast(k, dtype)
    return ops.broadcast_to(1.0 / number, (k,))


def _top(scores: Tensor, k: int | Tensor) -> Tensor:
    """Return the indices of the k largest scores, ascending; ties go to the lower index."""
    infinite = float("inf")
    ranked = ops.nan_to_num(scores, nan=infinite, posinf=infinite, neginf=-infinite)
    order = ops.argsort(-ranked)[:k]  # stable on every backend
    return ops.sort(ops.cast(order, "int32"))


def _inclusion_probabilities(
    scores: Tensor, k: int | Tensor, b: int | Tensor, floor: float
) -> Tensor:
    """Return (b,) probabilities proportional to score plus floor, at most 1, that sum to k.

    In descending order the certain samples are the first c, where c is the first position at which
    the next sample gets a probability of at most 1.
    """
    clipped = ops.maximum(scores, ops.zeros_like(scores))
    mean = ops.mean(clipped)
    usable = ops.logical_and(mean > 0, mean < float("inf"))
    q = ops.where(usable, clipped + floor * mean, ops.ones_like(clipped))
    order = ops.argsort(-q)
    descending = ops.take(q, order, axis=0)
    tails = ops.flip(ops.cumsum(ops.flip(descending, axis=0)), axis=0)  # sum of q from here on
    places = ops.cast(ops.arange(b, dtype="int32"), q.dtype)
    left = ops.cast(k, q.dtype) - places
    fits = ops.cast(left * descending <= tails, "int32")
    certain = ops.argmax(fits, axis=0)  # the first position that fits
    share = ops.take(left, certain, axis=0) / ops.take(tails, certain, axis=0)
    sure = places < ops.cast(certain, q.dtype)
    pi = ops.where(sure, ops.ones_like(q), share * descending)
    return ops.take(pi, ops.argsort(order), axis=0)


def _systematic(pi: Tensor, k: int | Tensor, b: int | Tensor, offset: Tensor) -> Tensor:
    """Return k ascending indices, i with probability pi_i: the intervals that contain a point."""
    ends = ops.cumsum(pi)
    places = ops.cast(ops.arange(k, dtype="int32"), pi.dtype)
    points = ops.sum(ops.cast(offset, pi.dtype)) + places
    # The number of intervals that end at or before each point. `searchsorted` also computes it, but
    # not in Keras 3.11's compiled TensorFlow.
    passed = ops.expand_dims(ends, 0) <= ops.expand_dims(points, 1)
    found = ops.sum(ops.cast(passed, "int32"), axis=1)
    # Rounding may make the last sum slightly too small and exceed the range: no sample twice.
    last = ops.cast(b, "int32") - ops.cast(k, "int32") + ops.arange(k, dtype="int32")
    return ops.minimum(found, last)
