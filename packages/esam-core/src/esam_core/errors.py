"""Exceptions raised by every esam package.

Each subclasses the matching built-in, so that `except ValueError` goes on working, and
`ESAMError`, so that a program can tell ours from everybody else's.
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
    """An argument has the right type and a value that cannot be used."""


class ESAMTypeError(ESAMError, TypeError):
    """An argument has a type that cannot be used."""


class ESAMRuntimeError(ESAMError, RuntimeError):
    """A call came at a moment, or in an environment, where it cannot do its work."""


class NonFiniteError(ESAMError, FloatingPointError):
    """A loss or a gradient was not finite and `on_nonfinite="raise"` was asked for."""
