"""Epsilon from the ascent gradient, in Keras operations; see `esam_core.perturbation`.

Equations: SAM (Foret et al. 2021, eq. 2), SWP (Du et al. 2022, eq. 6), ASAM (Kwon et al. 2021,
with its eta = 0); see `esam_core.perturbation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from esam_core import ESAMConfig

__all__ = ["Perturbation", "norm_weights", "perturb", "radius_per_norm", "wide_floatx", "widen"]

Tensor = Any


@dataclass(frozen=True)
class Perturbation:
    """The perturbation of a step.

    Args:
        climbed: T tensors theta_t + epsilon_t, which may be NaN unless `finite`.
        gradient_norm: ||g|| of equation 2 as `norm` defines it.
        perturbation_norm: ||epsilon||; 0 unless `finite`.
        finite: whether the norm, and therefore every gradient, was finite.
    """

    climbed: list[Tensor]
    gradient_norm: Tensor
    perturbation_norm: Tensor
    finite: Tensor


def perturb(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    scale: Sequence[float] | Tensor,
    rho: float,
    config: ESAMConfig,
    weight_masks: Sequence[Tensor] | None = None,
) -> Perturbation:
    """Return the parameters plus the perturbations from ascent gradients.

    Values with one number per unit are computed for all units together, because compilers take
    time for every operation.

    Args:
        gradients: T gradients g_t, None where not computed.
        parameters: T tensors theta_t.
        scale: T factors m_t / p_t: numbers, or one tensor (T,) if the mask is an input.
        rho: the step's radius.
        config: norm, norm_eps and adaptive.
        weight_masks: None, or T tensors of booleans that mask single weights.
    """
    places = [t for t, g in enumerate(gradients) if g is not None]
    wide = [widen(gradients[t]) for t in places]
    theta = [ops.cast(parameters[t], g.dtype) for t, g in zip(places, wide, strict=True)]
    lengths, directions = wide, wide
    if config.adaptive:
        lengths = [p * g for p, g in zip(theta, wide, strict=True)]
        directions = [p * p * g for p, g in zip(theta, wide, strict=True)]
    if weight_masks is not None:
        masks = [weight_masks[t] for t in places]
        directions = _mask(directions, masks)
        if config.norm != "full":
            lengths = _mask(lengths, masks)
    squares = _squares(lengths)
    known = not ops.is_tensor(scale)
    if known:
        factors = ops.convert_to_tensor([scale[t] for t in places], dtype=squares.dtype)
    else:  # Keras on JAX takes a list for floating-point numbers if floatx is bfloat16
        indices = ops.convert_to_tensor(places, dtype="int32")
        factors = ops.cast(ops.take(scale, indices, axis=0), squares.dtype)
    length = ops.sqrt(ops.sum(_weigh(squares, norm_weights(factors, config.norm))))
    finite = ops.isfinite(length)
    common = radius_per_norm(rho, length, config)

    steps = factors * common
    climbed = list(parameters)
    for i, t in enumerate(places):
        if known and scale[t] == 0.0:
            continue
        epsilon = ops.cast(steps[i], directions[i].dtype) * directions[i]
        climbed[t] = parameters[t] + ops.cast(epsilon, parameters[t].dtype)
    if config.adaptive or (weight_masks is not None and config.norm == "full"):
        squares = _squares(directions)
    # The square of a step may be infinite for a gradient of 0.
    sizes = ops.where(steps > 0, ops.sqrt(squares) * steps, ops.zeros_like(squares))
    size = ops.sqrt(ops.sum(ops.square(sizes)))
    return Perturbation(climbed, length, ops.where(finite, size, ops.zeros_like(size)), finite)


def radius_per_norm(rho: float, length: Tensor, config: ESAMConfig) -> Tensor:
    """Return rho / (||g|| + norm_eps), the common factor of all perturbations.

    Args:
        rho: the step's radius.
        length: ||g||, a scalar.
        config: norm and norm_eps.
    """
    divisor = ops.ones_like(length) if config.norm == "none" else length + config.norm_eps
    limits = np.finfo(keras.backend.standardize_dtype(divisor.dtype))
    radius = rho if rho <= float(limits.max) else float("inf")
    if config.norm_eps >= float(limits.tiny):
        return radius / divisor
    # norm_eps is negligible: a zero gradient must give zero, not 0 * inf.
    common = radius / ops.maximum(divisor, float(limits.tiny))
    return ops.where(length == 0.0, ops.zeros_like(common), common)


def norm_weights(factors: Any, norm: str) -> Any:
    """Return the weight of each unit's square in the norm; "none" has no norm.

    Args:
        factors: m_t / p_t of each unit: a list of numbers, or a tensor.
        norm: see `esam_core.perturbation.NORMS`.
    """
    if norm == "full":
        return ops.ones_like(factors)
    return factors if norm == "estimated" else ops.cast(factors > 0, factors.dtype)


def widen(gradient: Tensor) -> Tensor:
    """Return a gradient in float32 or wider."""
    narrow = keras.backend.standardize_dtype(gradient.dtype)
    return ops.cast(gradient, "float32") if "16" in narrow else gradient


def wide_floatx() -> str:
    """Return Keras's default dtype, or float32 if that is wider: for exact counts and sums."""
    return keras.backend.result_type(keras.config.floatx(), "float32")


def _mask(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with 0 where a mask is False, even for non-finite values."""
    return [ops.where(m, x, ops.zeros_like(x)) for x, m in zip(tensors, masks, strict=True)]


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor, as one vector of the widest dtype."""
    sums = [ops.sum(ops.square(x)) for x in tensors]
    widest = keras.backend.result_type(*(x.dtype for x in sums))
    return ops.stack([ops.cast(x, widest) for x in sums])


def _weigh(squares: Tensor, weights: Any) -> Tensor:
    """Return squares times weights; a weight of 0 gives 0 even for non-finite values."""
    return ops.where(weights > 0, squares * weights, ops.zeros_like(squares))
