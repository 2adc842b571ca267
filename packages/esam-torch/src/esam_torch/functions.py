"""The Python functions behind what the user passes as `losses`."""

import functools
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from esam_torch.lookups import attribute

__all__ = ["code_of", "function_in"]

#: How many wrappers are taken off: a function may wrap itself.
_MOST_WRAPPERS = 20


def function_in(losses: Any) -> tuple[FunctionType | None, Any]:
    """Return the Python function that is decorated, compiled, partial or bound, and its object.

    For an object that can be called, it is its `__call__` or, for a module, its `forward`. The
    function is None if it is not written in Python, and the object if the function is not bound.
    """
    found: FunctionType | None = None
    owner: Any = None
    for _ in range(_MOST_WRAPPERS):
        if isinstance(losses, functools.partial):
            losses = losses.func
        elif isinstance(losses, MethodType):
            owner, losses = losses.__self__, losses.__func__
        elif isinstance(losses, FunctionType):
            found, losses = losses, vars(losses).get("__wrapped__")
        elif isinstance(losses, nn.Module):
            losses = losses.forward
        else:
            call = attribute(type(losses), "__call__")
            if not isinstance(call, FunctionType):
                break
            owner, losses = losses, call
    return found, owner


def code_of(losses: Any) -> CodeType | type:
    """Return what functions with the same code have in common, such as lambdas made in a loop.

    For other objects that can be called, it is their type. Neither keeps a model alive.
    """
    found, _ = function_in(losses)
    return type(losses) if found is None else found.__code__
