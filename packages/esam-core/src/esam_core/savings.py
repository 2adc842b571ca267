r"""What SWP saves in the backward pass of the ascent in a chain of layers, fitted to timings.

The paper's appendix A.4 asks how much time Bernoulli(beta) masks over the N weight matrices of an
MLP save, g(N, beta), and fits two constants to timings (its equations 11 and 12, tables 4 and 5).
There are two savings, with one constant each:

- weight gradients: a matrix is not drawn with probability 1 - beta, and then needs none. Their
  share of the step is k1, so this saves k1 (1 - beta);
- activation gradients: back-propagation stops at the shallowest matrix drawn. It skips the j-th
  layer exactly if none of layers 1, ..., j is drawn, with probability (1 - beta)^j. Their share is
  k2, so this saves k2 / N times the sum of these probabilities over j.

.. math:: g(N, \beta) = k_1 (1 - \beta) + \frac{k_2}{N} \sum_{j=1}^{N} (1 - \beta)^j

The second term vanishes with depth. This is why independent masks rarely stop a backward pass
early, and why `Suffix` exists. The formula is derived here from the two mechanisms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from esam_core import validation
from esam_core.errors import ESAMValueError

__all__ = ["SavingsFit", "early_stop", "fit_savings", "savings"]


def early_stop(n: int, beta: float) -> float:
    """Return the expected share of N layers below the shallowest drawn one.

    Args:
        n: number of layers N, >= 1.
        beta: inclusion probability, in (0, 1].

    Example:
        >>> early_stop(1, 0.6), early_stop(2, 0.5)
        (0.4, 0.375)
    """
    validation.count_number("n", n, least=1)
    validation.open_unit("beta", beta)
    return float(np.mean((1.0 - beta) ** np.arange(1, n + 1)))


def savings(n: int, beta: float, k1: float, k2: float) -> float:
    """Return g(N, beta): the share of a step's time that SWP saves.

    Args:
        n: number of layers N, >= 1.
        beta: inclusion probability, in (0, 1].
        k1: share of the step's time that weight gradients take.
        k2: share of the step's time that activation gradients take.

    Example:
        >>> round(savings(4, 0.5, k1=0.32, k2=0.13), 4)
        0.1905
    """
    return k1 * (1.0 - beta) + k2 * early_stop(n, beta)


@dataclass(frozen=True)
class SavingsFit:
    """A least-squares fit of g(N, beta).

    Args:
        k1: share of the weight gradients.
        k2: share of the activation gradients.
        k1_error: standard error of k1.
        k2_error: standard error of k2.
        residual: root mean square of the residuals, with two degrees of freedom subtracted.
    """

    k1: float
    k2: float
    k1_error: float
    k2_error: float
    residual: float


def fit_savings(n: Sequence[int], beta: Sequence[float], saved: ArrayLike) -> SavingsFit:
    """Return the constants that best fit measured savings, with standard errors.

    Args:
        n: layers N of each measurement.
        beta: inclusion probability of each measurement.
        saved: share of the step's time saved in each measurement; three or more.

    Raises:
        ESAMValueError: there are too few measurements, one is not finite, or they do not determine
            both constants.

    Example:
        >>> n, beta = [1, 2, 4, 8], [0.2, 0.4, 0.6, 0.8]
        >>> fit = fit_savings(n, beta, [savings(*row, k1=0.3, k2=0.1) for row in zip(n, beta)])
        >>> round(fit.k1, 6), round(fit.k2, 6)
        (0.3, 0.1)
    """
    measured: NDArray[Any] = np.asarray(saved, dtype=np.float64)
    if measured.ndim != 1 or not np.isfinite(measured).all():
        raise ESAMValueError(
            f"`saved` must be a sequence of finite numbers. Received: saved={saved!r}."
        )
    if len(n) != len(measured) or len(beta) != len(measured) or len(measured) < 3:
        raise ESAMValueError(
            "`n`, `beta` and `saved` must have the same length, three or more. "
            f"Received: lengths {len(n)}, {len(beta)}, {len(measured)}."
        )
    design = np.array([[1.0 - b, early_stop(m, b)] for m, b in zip(n, beta, strict=True)])
    if np.linalg.matrix_rank(design) < 2:
        raise ESAMValueError(
            "`n` and `beta` must vary: at N = 1 the two savings cannot be distinguished. "
            f"Received: n={list(n)!r}, beta={list(beta)!r}."
        )
    (k1, k2), *_ = np.linalg.lstsq(design, measured, rcond=None)
    left = measured - design @ np.array([k1, k2])
    variance = float(left @ left) / (len(measured) - 2)
    errors = np.sqrt(np.diag(variance * np.linalg.inv(design.T @ design)))
    return SavingsFit(float(k1), float(k2), float(errors[0]), float(errors[1]), variance**0.5)
