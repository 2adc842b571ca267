"""Variables that `losses` uses: those around it, global ones, and attributes of both."""

import dis
import functools
import io
import itertools
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esam_core import ESAMRuntimeError
from esam_torch.compat import count_writes
from esam_torch.functions import function_in
from esam_torch.lookups import attribute
from esam_torch.reading import refuse_used_up
from esam_torch.values import MISSING, Place

__all__ = ["Variables", "assigned_places"]

#: Where a variable is, and the parts of its name: `self.args.by` is ("self", "args", "by").
_Path = tuple[str, ...]
_Variable = tuple[str, _Path]

#: The kinds of variables: global ones, and those around a function or its own first argument.
_GLOBAL, _LOCAL = "global", "local"
_KINDS = {"GLOBAL": _GLOBAL, "NAME": _GLOBAL, "DEREF": _LOCAL}

#: Values of these types are compared by value: computing a number again gives another object.
_VALUES = (bool, int, float, complex, str, bytes, np.generic, torch.device)

#: Iterators of these types are for logs and counts.
_HARMLESS = (io.IOBase, itertools.count)

#: The attributes of objects of these types are no variables.
_MODULES = (nn.Module, ModuleType)


class Variables:
    """The variables that `losses` reads after the first pass of a step.

    They include attributes, such as `self.by`, but not those of modules, which `Attributes` tracks.
    Those that it assigns itself are left out, and so are those of functions that it calls.

    Args:
        losses: the user's function.
        watched: whether to look for iterators and random generators.

    Raises:
        ESAMTypeError: one of them is an iterator or a random generator.
    """

    def __init__(self, losses: Any, *, watched: bool) -> None:
        function, owner = function_in(losses)
        self._read = [] if function is None else _variables(function.__code__)[0]
        self._scopes = {} if function is None else _scopes(function, owner)
        self._before = self._values()
        for name, (value, _) in self._before.items() if watched else ():
            if not isinstance(value, _HARMLESS):
                refuse_used_up(value, name)

    def check(self) -> None:
        """Raise if any of them has another value now.

        Raises:
            ESAMRuntimeError: the later passes would compute another loss than the first.
        """
        now = self._values()
        for name, (before, writes) in self._before.items():
            after, writes_now = now.get(name, (MISSING, 0))
            if writes == writes_now and _same(before, after):
                continue
            received = f"another value of `{name}`"
            if after is MISSING:  # a threading.local, or it was deleted
                received = f"no `{name}` any more (a threading.local has none in a GPU's backward)"
            raise ESAMRuntimeError(
                "The variables that `losses` reads must not change between optimizer.loss(...) and "
                f"the backward of this loss, which calls `losses` again. Received: {received}. "
                "Pass it as an argument of `losses`, as in optimizer.loss(losses, ..., "
                f"{name.split('.')[-1]}={name}), or call the backward before it changes."
            )

    def _values(self) -> dict[str, tuple[Any, int]]:
        """Return the variables' values and how often these were written to in place, by name."""
        found = {}
        for kind, path, name in self._read:
            value = _resolve(self._scopes[kind], path)
            if value is not MISSING:
                found[name] = value, count_writes(value) if isinstance(value, Tensor) else 0
        return found


def assigned_places(losses: Any) -> list[Place]:
    """Return the places of the variables and attributes that `losses` assigns itself.

    Attributes of modules are left out: `Writes` tracks them.
    """
    function, owner = function_in(losses)
    if function is None:
        return []
    _, assigned = _variables(function.__code__)
    scopes = _scopes(function, owner) if assigned else {}
    found: list[Any] = []
    for kind, (*holder, name) in assigned:
        own = _attributes(_resolve(scopes[kind], tuple(holder))) if holder else scopes[kind]
        if isinstance(own, dict) or (isinstance(own, _Local) and own.holds(name)):
            found.append((own, name))
    return found


class _Local:
    """The variables around a function, and the object that it is bound to, like a dictionary."""

    def __init__(self, function: FunctionType, owner: Any) -> None:
        code = function.__code__
        self._cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._bound = {} if owner is None else dict.fromkeys(code.co_varnames[:1], owner)

    def holds(self, name: str) -> bool:
        """Return whether a name is that of a variable around the function."""
        return name in self._cells

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a variable, or a default if it has none."""
        if name in self._bound:
            return self._bound[name]
        try:
            return self._cells[name].cell_contents if name in self._cells else default
        except ValueError:  # it has no value yet, or has been deleted
            return default

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value

    def pop(self, name: str, _: Any = None) -> None:
        """Leave a variable without a value."""
        del self._cells[name].cell_contents


def _scopes(function: FunctionType, owner: Any) -> dict[str, Any]:
    """Return where a function finds its variables, by kind."""
    return {_GLOBAL: function.__globals__, _LOCAL: _Local(function, owner)}


def _resolve(scope: Any, path: _Path) -> Any:
    """Return the value of a variable or an attribute, or MISSING if there is none."""
    value = scope.get(path[0], MISSING)
    for name in path[1:]:
        value = (_attributes(value) or {}).get(name, MISSING)
    return value


def _attributes(x: Any) -> Any:
    """Return the attributes of an object, a mapping; None for modules, of Python or of torch."""
    return None if isinstance(x, _MODULES) else attribute(x, "__dict__")


def _same(before: Any, after: Any) -> bool:
    """Return whether two values are the same object, or equal numbers or tuples of them."""
    if before is after or type(before) is not type(after):
        return before is after
    if isinstance(before, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    return isinstance(before, _VALUES) and bool(before == after)


@functools.lru_cache(maxsize=256)
def _variables(code: CodeType) -> tuple[list[tuple[str, _Path, str]], list[_Variable]]:
    """Return the variables and attributes that code only reads, and those that it assigns.

    The former are returned with their names, such as "self.args.by".
    """
    read, assigned = _uses(code)
    only = [
        (kind, path, ".".join(path))
        for kind, path in read
        if not any((kind, path[:n]) in assigned for n in range(1, len(path) + 1))
    ]
    return only, list(assigned)


def _uses(code: CodeType) -> tuple[dict[_Variable, None], dict[_Variable, None]]:
    """Return the variables and attributes that code reads, and those that it assigns."""
    read: dict[_Variable, None] = {}
    assigned: dict[_Variable, None] = {}
    kind, path, copied = _GLOBAL, _Path(), False
    for instruction in dis.get_instructions(code):
        (action, _, what), name = instruction.opname.partition("_"), instruction.argval
        if action == "COPY":  # of an object, if one of its attributes changes: `self.n += 1`
            copied = True
            continue
        if what in ("ATTR", "METHOD"):
            path = (*path, name) if path else ()
        elif what in _KINDS and action != "IMPORT":
            kind, path = _KINDS[what], (name,)
        elif "LOAD_FAST" in instruction.opname:  # the first argument may be an object
            name = name[-1] if isinstance(name, tuple) else name
            kind, path = _LOCAL, (name,) if name in code.co_varnames[:1] else ()
        else:
            path = ()
        stored = action in ("STORE", "DELETE") and (what == "ATTR" or what in _KINDS)
        if path:
            changed = stored or (copied and len(path) > 1)
            (assigned if changed else read)[kind, path] = None
        path, copied = () if stored else path, False
    for inner in code.co_consts:
        if isinstance(inner, CodeType):  # a function or a comprehension within it
            for found, kept in zip(_uses(inner), (read, assigned), strict=True):
                kept.update((v, None) for v in found if _is_around(v, inner))
    return read, assigned


def _is_around(variable: _Variable, code: CodeType) -> bool:
    """Return whether code does not create a variable itself."""
    kind, path = variable
    return kind == _GLOBAL or path[0] in code.co_freevars
