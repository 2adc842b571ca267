"""The perturbation epsilon from the ascent gradient: the NumPy reference for all backends.

Equations. SAM (Foret et al. 2021, eq. 2) with SWP (Du et al. 2022, eq. 6):

    eps_t = (m_t / p_t) rho g_t / (||g|| + norm_eps)

and, adaptive (Kwon et al. 2021, ASAM, with its eta = 0):

    eps_t = (m_t / p_t) rho |theta_t|^2 g_t / (|| |theta| g || + norm_eps)

For complex weights g is the direction of steepest ascent, d/d(re) + i d/d(im), as in PyTorch.
There is one norm over all units, accumulated in float64 here and in float32 or wider in backends.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from esam_core.errors import ESAMValueError

__all__ = ["NORMS", "Norm", "perturbation_norm", "perturbations", "squared_norms"]

#: "masked" (the authors' code): the norm of the gradient that was computed; if all p_t are p, the
#: perturbation has norm rho / p. "estimated": ||g||^2 ~ sum of m_t ||g_t||^2 / p_t, unbiased for
#: the square, at no extra cost; the perturbation has norm rho / sqrt(p). "full": the whole
#: gradient's norm, at the cost of a whole backward pass; the perturbation's norm is rho / sqrt(p)
#: in the root mean square over the masks. "none": Algorithm 1 as printed, eps = (rho / p) g.
Norm = Literal["masked", "estimated", "full", "none"]

#: The values of `Norm`.
NORMS: tuple[Norm, ...] = get_args(Norm)

Array = NDArray[np.inexact[Any]]


def squared_norms(
    gradients: Sequence[Array | None], parameters: Sequence[Array], adaptive: Sequence[bool]
) -> list[float]:
    """Return ||g_t||^2, or || |theta_t| g_t ||^2 for adaptive units; 0 where there is no g_t."""
    squares = []
    for g, theta, is_adaptive in zip(gradients, parameters, adaptive, strict=True):
        if g is None:
            squares.append(0.0)
        else:
            scaled = np.abs(theta) * g if is_adaptive else g
            squares.append(float(np.sum(np.square(np.abs(scaled), dtype=np.float64))))
    return squares


def perturbation_norm(
    gradients: Sequence[Array | None],
    parameters: Sequence[Array],
    scale: Sequence[float | Array],
    *,
    norm: Norm,
    adaptive: Sequence[bool],
) -> float:
    """Return the denominator ||g|| of the equations above, before norm_eps is added.

    Args:
        gradients: T arrays, None for units whose gradient was not computed.
        parameters: T arrays theta_t.
        scale: T factors m_t / p_t; an array of theta_t's shape if single weights are perturbed.
        norm: one of `NORMS`.
        adaptive: T booleans.

    Returns:
        The norm; 1.0 for `norm="none"`.
    """
    if norm == "none":
        return 1.0
    if norm == "full":
        return float(np.sqrt(sum(squared_norms(gradients, parameters, adaptive))))
    if norm == "estimated":
        factors = [np.sqrt(s) for s in scale]  # so that the squares carry m_t / p_t
    elif norm == "masked":
        factors = [np.asarray(s) > 0 for s in scale]
    else:
        raise ESAMValueError(f"`norm` must be one of {NORMS}. Received: norm={norm!r}.")
    weighted = [None if g is None else f * g for f, g in zip(factors, gradients, strict=True)]
    return float(np.sqrt(sum(squared_norms(weighted, parameters, adaptive))))


def perturbations(
    gradients: Sequence[Array | None],
    parameters: Sequence[Array],
    scale: Sequence[float | Array],
    *,
    rho: Sequence[float],
    norm: Norm = "masked",
    norm_eps: float = 1e-12,
    adaptive: Sequence[bool],
) -> list[Array]:
    """Return the T perturbations eps_t; zeros for units not perturbed, or if g is not finite.

    Args:
        gradients: T arrays, None where not computed.
        parameters: T arrays theta_t.
        scale: T factors m_t / p_t; an array of theta_t's shape if single weights are perturbed.
        rho: T radii >= 0.
        norm: one of `NORMS`.
        norm_eps: added to the norm, > 0.
        adaptive: T booleans.

    Example:
        >>> (eps,) = perturbations([np.array([3.0, 4.0])], [np.zeros(2)], [1.0], rho=[0.5],
        ...                        adaptive=[False])
        >>> eps.round(6).tolist()
        [0.3, 0.4]
    """
    length = perturbation_norm(gradients, parameters, scale, norm=norm, adaptive=adaptive)
    if norm == "none":
        norm_eps = 0.0
    finite = np.isfinite(length) and all(g is None or bool(np.isfinite(g).all()) for g in gradients)
    result = []
    for g, theta, s, radius, is_adaptive in zip(
        gradients, parameters, scale, rho, adaptive, strict=True
    ):
        if g is None or not finite:
            result.append(np.zeros_like(theta))
        else:
            direction = np.square(np.abs(theta)) * g if is_adaptive else g
            # A zero gradient must give zero: norm_eps may be 0 in the gradient's dtype.
            divisor = max(length + norm_eps, float(np.finfo(np.result_type(direction)).tiny))
            result.append(np.asarray(s * radius * direction / divisor))
    return result
