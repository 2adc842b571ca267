"""Looking up attributes of the user's objects, which may raise anything for names without a value.

A dictionary with `__getattr__ = dict.__getitem__` raises a KeyError, for example.
"""

from typing import Any

__all__ = ["attribute", "defines", "length_of"]


def attribute(x: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of an object, or a default if there is none."""
    try:
        return getattr(x, name, default)
    except Exception:  # see above
        return default


def length_of(x: Any) -> int | None:
    """Return the length of an object; None if there is none, or asking for it is an error."""
    try:
        return len(x)
    except Exception:
        return None


def defines(x: Any, *names: str) -> bool:
    """Return whether the class of an object defines all names; those of its items do not count."""
    return all(hasattr(type(x), name) for name in names)
