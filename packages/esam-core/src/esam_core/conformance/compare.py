"""Comparisons whose errors state what differs, where, and by how much.

Shape and dtype are compared before values, because broadcasting can hide any fault.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core.conformance.tolerances import tolerance

__all__ = [
    "ConformanceError",
    "close",
    "close_all",
    "equal",
    "equal_all",
    "has_nonfinite",
    "require",
]


class ConformanceError(AssertionError):
    """A backend does not do what the kit requires. Raised by every `check_*` function."""


def require(condition: bool, message: str) -> None:
    """Raise ConformanceError with the message unless the condition holds."""
    if not condition:
        raise ConformanceError(message)


def _array(what: str, value: Any) -> NDArray[Any]:
    """Return a backend's value as an array; raise for None and anything except numbers."""
    require(value is not None, f"{what}: expected numbers, got None.")
    array = np.asarray(value)
    require(array.dtype != object, f"{what}: expected numbers, got {type(value).__name__}.")
    return array


def close(what: str, actual: Any, expected: Any, *, kind: str, dtype: str) -> None:
    """Require equality within the tolerance of a kind.

    Args:
        what: the name of the quantity in the message.
        actual: the backend's value: an array of this dtype, or a Python number.
        expected: the reference's value.
        kind: a row of `TOLERANCES`.
        dtype: the session's dtype.
    """
    scale = float(np.max(np.abs(expected), initial=0.0))
    _close(what, actual, expected, scale * tolerance(kind, dtype), f"{kind}, {dtype}", dtype)


def _close(what: str, actual: Any, expected: Any, allowed: float, row: str, dtype: str) -> None:
    """Require an array with this dtype and the expected shape, with each error within `allowed`."""
    found, wanted = _array(what, actual), np.asarray(expected, dtype=np.float64)
    require(
        found.shape == wanted.shape,
        f"{what}: expected shape {wanted.shape}, got {found.shape}.",
    )
    # A Python number is a float64: only arrays have a dtype chosen by the backend.
    if isinstance(actual, np.ndarray) and actual.ndim:
        require(found.dtype == dtype, f"{what}: expected dtype {dtype}, got {found.dtype}.")
    error = np.abs(found.astype(np.float64) - wanted)
    if not np.all(error <= allowed):  # not `any >`: NaN must fail
        place = np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), error.shape)
        raise ConformanceError(
            f"{what}: expected {wanted[place]!r} at {tuple(map(int, place))}, got "
            f"{found[place]!r}: the error is {error[place]:.3g}, allowed is {allowed:.3g} ({row})."
        )


def close_all(
    what: str,
    actual: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    kind: str,
    dtype: str,
) -> None:
    """Require equal names, and equality of each array within one tolerance for all of them."""
    _same_names(what, actual, expected)
    scale = max((float(np.max(np.abs(a), initial=0.0)) for a in expected.values()), default=0.0)
    for name, wanted in expected.items():
        allowed = scale * tolerance(kind, dtype)
        _close(f"{what} {name!r}", actual[name], wanted, allowed, f"{kind}, {dtype}", dtype)


def equal(what: str, actual: Any, expected: Any) -> None:
    """Require exact equality of integers, names or None; of arrays bit for bit."""
    if expected is None or actual is None:
        require(actual is expected, f"{what}: expected {_short(expected)}, got {_short(actual)}.")
        return
    found, wanted = np.asarray(actual), np.asarray(expected)
    if wanted.dtype.kind in "iu" and found.size:
        require(found.dtype.kind in "iu", f"{what}: expected integers, got {_short(actual)}.")
    same = found.shape == wanted.shape and bool(np.array_equal(found, wanted))
    require(same, f"{what}: expected exactly {_short(expected)}, got {_short(actual)}.")


def equal_all(what: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Require equal names, and arrays of equal dtype that agree bit for bit."""
    _same_names(what, actual, expected)
    for name, wanted in expected.items():
        found = actual[name]
        require(
            isinstance(found, np.ndarray),
            f"{what} {name!r}: expected a NumPy array, got {type(found).__name__}.",
        )
        require(
            found.dtype == wanted.dtype and found.shape == wanted.shape,
            f"{what} {name!r}: {found.dtype}{found.shape} instead of {wanted.dtype}{wanted.shape}.",
        )
        if found.tobytes() != wanted.tobytes():
            gap = np.max(np.abs(found.astype(np.float64) - wanted.astype(np.float64)))
            raise ConformanceError(
                f"{what} {name!r}: not equal bit for bit; the largest error is {gap:.3g}."
            )


def has_nonfinite(arrays: Mapping[str, Any]) -> dict[str, bool]:
    """Return, for each array, whether it contains a non-finite value."""
    return {name: not bool(np.isfinite(a).all()) for name, a in arrays.items()}


def _same_names(what: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Require the same set of names."""
    require(
        isinstance(actual, Mapping),
        f"{what}: expected arrays by name, got {type(actual).__name__}.",
    )
    missing, strange = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    require(
        not missing and not strange,
        f"{what}: names differ: missing {missing}, unexpected {strange}.",
    )


def _short(value: Any) -> str:
    """Return a value's text, shortened if it is long."""
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 200 else text[:197] + "..."
