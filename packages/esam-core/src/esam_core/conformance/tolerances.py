"""The table of tolerances: how much a backend may differ from the float64 reference, and why.

A tolerance is a multiple of eps, the dtype's distance from 1 to the next number (float32:
1.19e-7, float64: 2.22e-16), times the largest magnitude of the compared values: errors of sums and
products scale with their terms, not with their result after cancellation. The multiples are at
least ten times what NumPy in float32 and torch need, because other libraries round and order sums
differently. The faults that the kit looks for are thousands of times larger.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["TOLERANCES", "Tolerance", "tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """A multiple of eps, by dtype, and the reason for it."""

    float32: float
    float64: float
    reason: str


#: Rows by kind of quantity.
TOLERANCES = {
    "losses": Tolerance(
        64.0,
        64.0,
        "a forward through at most eight layers with sums of at most 32 terms, exp and log",
    ),
    "norms": Tolerance(
        64.0, 64.0, "a backward, then one square root of a sum of squares, all of one sign"
    ),
    "gradient": Tolerance(
        128.0,
        128.0,
        "two forwards and backwards; the error of epsilon comes in through the curvature",
    ),
    "weights": Tolerance(
        64.0, 64.0, "up to six updates, each with the error of its gradient times lr = 0.1"
    ),
    "adaptive weights": Tolerance(
        128.0,
        128.0,
        "Adam divides by the gradient's size: small entries carry the error of the large ones",
    ),
    "buffers": Tolerance(32.0, 32.0, "a mean and a variance of activations, mixed once per step"),
    "same": Tolerance(
        32.0, 32.0, "the same computation twice in one backend, compiled or fused differently"
    ),
    "sample weights": Tolerance(
        128.0, 128.0, "b times a score over the sum of the scores, each with its own error"
    ),
}


def tolerance(kind: str, dtype: str) -> float:
    """Return the tolerance of a kind for a magnitude of 1.

    Example:
        >>> tolerance("losses", "float64") == 64 * 2.0**-52
        True
    """
    return float(getattr(TOLERANCES[kind], dtype) * np.finfo(dtype).eps)
