"""Warnings that point at the user's line."""

import inspect
import warnings

__all__ = ["warn_user"]

#: The packages whose frames are between a warning and the user's line.
INSIDE = frozenset({"esam_keras", "jax", "keras", "tensorflow", "torch"})


def warn_user(message: str) -> None:
    """Warn at the line that called Keras or this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _package(frame.f_globals) in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    """Return the top-level package of a module's names."""
    return str(names.get("__name__", "")).partition(".")[0]
