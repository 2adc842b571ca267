"""Exceptions raised by every esam package.

Each subclasses the matching built-in, so that `except ValueError` keeps working, and `ESAMError`,
so that callers can catch esam's errors alone.
"""

__all__ = [
    "ESAMError",
    "ESAMRuntimeError",
    "ESAMTypeError",
    "ESAMValueError",
    "NonFiniteError",
]


class ESAMError(Exception):
    """Base class of every exception that esam raises on purpose."""


class ESAMValueError(ESAMError, ValueError):
    """An argument has the right type but an invalid value."""


class ESAMTypeError(ESAMError, TypeError):
    """An argument has the wrong type."""


class ESAMRuntimeError(ESAMError, RuntimeError):
    """A call was made in a state or an environment in which it cannot work."""


class NonFiniteError(ESAMError, FloatingPointError):
    """A loss or a gradient was not finite, and `on_nonfinite="raise"` was set."""
