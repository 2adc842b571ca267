"""Variables that `losses` reads from outside: those around it, and global ones."""

import dis
import functools
from types import CodeType, FunctionType
from typing import Any

from esam_core import ESAMRuntimeError
from esam_torch.functions import function_in

__all__ = ["Variables"]

#: Values of these types are compared by value: computing a number again gives another object.
_NUMBERS = (bool, int, float, complex, str, bytes)

_EMPTY = object()


class Variables:
    """The variables that `losses` reads after the first pass of a step.

    Those that it assigns itself are left out, and so are those of functions that it calls.

    Args:
        losses: the user's function.
    """

    def __init__(self, losses: Any) -> None:
        self._function = function_in(losses)
        self._before = {} if self._function is None else _values(self._function)

    def check(self) -> None:
        """Raise if any of them has another value now.

        Raises:
            ESAMRuntimeError: the later passes would compute another loss than the first.
        """
        if self._function is None:
            return
        now = _values(self._function)
        for name, before in self._before.items():
            after = now.get(name, _EMPTY)
            if after is before or (
                type(after) is type(before) and type(after) in _NUMBERS and after == before
            ):
                continue
            raise ESAMRuntimeError(
                "The variables that `losses` reads must not change between optimizer.loss(...) and "
                "the backward of this loss, which calls `losses` again. Received: another value of "
                f"`{name}`. Keep its value in a default argument, as in `lambda x, y, {name}="
                f"{name}: ...`, or call the backward before it changes."
            )


def _values(function: FunctionType) -> dict[str, Any]:
    """Return the values of a function's variables, by name."""
    read, assigned = _names(function.__code__)
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name not in assigned:
            try:
                found[name] = cell.cell_contents
            except ValueError:  # it has no value yet, or has been deleted
                continue
    known = function.__globals__
    for name in read:
        if name in known:
            found[name] = known[name]
    return found


@functools.lru_cache(maxsize=256)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the global variables that code only reads, and of all that it assigns."""
    read: set[str] = set()
    assigned: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_DEREF"):
            assigned.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):  # a function or a comprehension within it
            names, stored = _names(inner)
            read |= names
            assigned |= stored
    return frozenset(read - assigned), frozenset(assigned)
