"""The Python functions behind what the user passes as `losses`."""

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

__all__ = ["code_of", "functions_in"]

#: How many wrappers are taken off: a function may wrap itself.
_MOST_WRAPPERS = 20


def functions_in(losses: Any) -> Iterator[FunctionType]:
    """Yield a Python function and those that it wraps: decorated, compiled, partial or methods.

    Nothing is yielded for other objects that can be called.
    """
    for _ in range(_MOST_WRAPPERS):
        if isinstance(losses, functools.partial):
            losses = losses.func
        elif isinstance(losses, MethodType):
            losses = losses.__func__
        elif isinstance(losses, FunctionType):
            yield losses
            losses = vars(losses).get("__wrapped__")
        else:
            return


def code_of(losses: Any) -> CodeType | type:
    """Return what functions with the same code have in common, such as lambdas made in a loop.

    For other objects that can be called, it is their type. Neither keeps a model alive.
    """
    found = list(functions_in(losses))
    return found[-1].__code__ if found else type(losses)
