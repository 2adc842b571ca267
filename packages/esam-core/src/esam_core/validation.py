"""Checks of single arguments. Errors name the requirement and the value received."""

import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

import numpy as np

from esam_core.errors import ESAMTypeError, ESAMValueError

__all__ = ["choice", "count_number", "flag", "nonnegative", "open_unit", "positive", "sequence"]


def _real(name: str, value: Any, must: str) -> float:
    """Return `value` as a float; raise for booleans, strings and NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ESAMTypeError(f"`{name}` must be {must}. Received: {name}={value!r}.")
    try:
        # float32's 0.61 is meant as 0.61, and not as the 0.6100000143 that it is stored as.
        number = float(str(value) if isinstance(value, np.floating) else value)
    except OverflowError:  # an integer above 1.8e308
        number = math.inf if value == abs(value) else -math.inf
    if math.isnan(number):
        raise ESAMValueError(f"`{name}` must be {must}. Received: {name}={value!r}.")
    return number


def open_unit(name: str, value: Any) -> float:
    """Return `value` as a float in (0, 1]."""
    number = _real(name, value, "a number in (0, 1]")
    if not 0.0 < number <= 1.0:
        raise ESAMValueError(f"`{name}` must be in (0, 1]. Received: {name}={value!r}.")
    return number


def nonnegative(name: str, value: Any) -> float:
    """Return `value` as a finite float >= 0."""
    number = _real(name, value, "a finite number >= 0")
    if number < 0.0 or math.isinf(number):
        raise ESAMValueError(f"`{name}` must be finite and >= 0. Received: {name}={value!r}.")
    return number


def positive(name: str, value: Any) -> float:
    """Return `value` as a finite float > 0."""
    number = _real(name, value, "a finite number > 0")
    if number <= 0.0 or math.isinf(number):
        raise ESAMValueError(f"`{name}` must be finite and > 0. Received: {name}={value!r}.")
    return number


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is a bool."""
    if not isinstance(value, bool):
        raise ESAMTypeError(f"`{name}` must be True or False. Received: {name}={value!r}.")
    return value


def count_number(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """Return `value` as an int in [least, most]."""
    bound = f">= {least}" if most is None else f"in [{least}, {most}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ESAMTypeError(f"`{name}` must be an integer {bound}. Received: {name}={value!r}.")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise ESAMValueError(f"`{name}` must be {bound}. Received: {name}={value!r}.")
    return number


def choice(name: str, value: Any, options: Collection[str]) -> str:
    """Return `value`, as Python's own string, if it is one of `options`."""
    if not isinstance(value, str) or value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ESAMValueError(f"`{name}` must be one of {listed}. Received: {name}={value!r}.")
    return str(value)  # torch does not load NumPy's


def sequence(name: str, value: Any, must: str) -> list[Any]:
    """Return an ordered iterable or a one-dimensional array as a list; raise for anything else."""
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Set | Mapping)
    if not listed or (isinstance(value, np.ndarray) and value.ndim != 1):
        raise ESAMTypeError(f"`{name}` must be {must}. Received: {name}={value!r}.")
    return list(value)
