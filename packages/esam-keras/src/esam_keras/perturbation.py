"""Epsilon from the ascent gradient, in Keras's operations: compiled twin of the core's.

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

__all__ = ["Ascent", "perturb"]

Tensor = Any


@dataclass(frozen=True)
class Ascent:
    """The perturbation of a step.

    Args:
        perturbations: T tensors epsilon_t; None for units left alone.
        gradient_norm: ||g|| of equation 2 as `norm` defines it.
        perturbation_norm: ||epsilon||.
        finite: whether the norm was finite, and thereby every gradient.
    """

    perturbations: list[Tensor | None]
    gradient_norm: Tensor
    perturbation_norm: Tensor
    finite: Tensor


def perturb(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    scale: Sequence[float | Tensor],
    config: ESAMConfig,
    weight_masks: Sequence[Tensor] | None = None,
) -> Ascent:
    """Turn ascent gradients into perturbations.

    Args:
        gradients: T gradients g_t, None where not computed.
        parameters: T tensors theta_t.
        scale: T factors m_t / p_t: numbers, or scalar tensors where the mask is an input.
        config: norm, norm_eps, rho and adaptive.
        weight_masks: None, or T tensors of 0 and 1 that mask single weights.
    """
    wide = [None if g is None else widened(g) for g in gradients]
    theta = [
        ops.cast(p, g.dtype) if g is not None else p for p, g in zip(parameters, wide, strict=True)
    ]
    if config.adaptive:
        directions = [None if g is None else p * p * g for p, g in zip(theta, wide, strict=True)]
        lengths = [None if g is None else p * g for p, g in zip(theta, wide, strict=True)]
    else:
        directions, lengths = wide, wide
    factors: list[Tensor] = list(scale)
    if weight_masks is not None:
        factors = [
            None if g is None else s * ops.cast(m, g.dtype)
            for s, m, g in zip(scale, weight_masks, wide, strict=True)
        ]
    length = _norm(lengths, factors, config.norm)
    finite = ops.isfinite(length)
    divisor = ops.ones_like(length) if config.norm == "none" else length + config.norm_eps
    common = _representable(config.rho, divisor) / divisor
    found: list[Tensor | None] = []
    for direction, factor, s in zip(directions, factors, scale, strict=True):
        if direction is None or _is_zero(s):
            found.append(None)
        else:
            epsilon = _cast_like(factor, direction) * ops.cast(common, direction.dtype) * direction
            # 0 * inf is not a number, and epsilon must be 0 where anything is not finite.
            found.append(ops.where(finite, epsilon, ops.zeros_like(epsilon)))
    squares = [_square_sum(e) for e in found if e is not None]
    return Ascent(found, length, ops.sqrt(_total(squares)), finite)


def widened(gradient: Tensor) -> Tensor:
    """Return a gradient in float32 or wider."""
    narrow = ops.dtype(gradient) if hasattr(ops, "dtype") else str(gradient.dtype)
    return ops.cast(gradient, "float32") if "16" in str(narrow) else gradient


def _representable(number: float, like: Tensor) -> float:
    """Return a number as a tensor's dtype has it: infinite where it is too large, silently."""
    largest = float(np.finfo(keras.backend.standardize_dtype(like.dtype)).max)
    return number if number <= largest else float("inf")


def _norm(lengths: Sequence[Tensor | None], factors: Sequence[Tensor], norm: str) -> Tensor:
    """Return ||g||; with norm="none", where nothing is divided by, that of "masked"."""
    squares = []
    for length, factor in zip(lengths, factors, strict=True):
        if length is None:
            continue
        if norm == "full":
            squares.append(_square_sum(length))
        elif isinstance(factor, float):
            if factor > 0.0:
                squares.append(_square_sum(length) * (factor if norm == "estimated" else 1.0))
        else:
            chosen = ops.cast(factor > 0, length.dtype)
            # Zeros of the mask must also silence what is not finite under them.
            square = ops.where(factor > 0, ops.square(length), ops.zeros_like(length))
            weight = _cast_like(factor, length) if norm == "estimated" else chosen
            squares.append(ops.sum(weight * square))
    return ops.sqrt(_total(squares))


def _square_sum(tensor: Tensor) -> Tensor:
    """Return the sum of squares."""
    return ops.sum(ops.square(tensor))


def _total(terms: Sequence[Tensor]) -> Tensor:
    """Return a sum, in the widest of the terms' dtypes."""
    widest = keras.backend.result_type(*(term.dtype for term in terms))
    return sum((ops.cast(term, widest) for term in terms[1:]), ops.cast(terms[0], widest))


def _is_zero(scale: Any) -> bool:
    """Say whether a unit is known to be left alone."""
    return isinstance(scale, float) and scale == 0.0


def _cast_like(factor: Any, like: Tensor) -> Any:
    """Return a factor that multiplies with a tensor without widening it."""
    return factor if isinstance(factor, float) else ops.cast(factor, like.dtype)
