"""The Python functions behind what the user passes as `losses`."""

import functools
from types import CodeType, FunctionType, MethodType
from typing import Any

__all__ = ["code_of", "function_in"]

#: How many wrappers are taken off: a function may wrap itself.
_MOST_WRAPPERS = 20


def function_in(losses: Any) -> FunctionType | None:
    """Return the Python function that is decorated, compiled, partial or bound to an object.

    None is returned for other objects that can be called.
    """
    found: FunctionType | None = None
    for _ in range(_MOST_WRAPPERS):
        if isinstance(losses, functools.partial):
            losses = losses.func
        elif isinstance(losses, MethodType):
            losses = losses.__func__
        elif isinstance(losses, FunctionType):
            found = losses
            losses = vars(losses).get("__wrapped__")
        else:
            break
    return found


def code_of(losses: Any) -> CodeType | type:
    """Return what functions with the same code have in common, such as lambdas made in a loop.

    For other objects that can be called, it is their type. Neither keeps a model alive.
    """
    found = function_in(losses)
    return type(losses) if found is None else found.__code__
