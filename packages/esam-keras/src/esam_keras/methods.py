"""Methods of models and layers: which are the user's own, and replacing them for some time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

__all__ = ["has_own", "replace_methods"]


def has_own(model: Any, name: str) -> bool:
    """Return whether a model, or its class, has its own version of a method of `keras.Model`."""
    return name in vars(model) or getattr(type(model), name) is not getattr(keras.Model, name)


@contextmanager
def replace_methods(methods: Sequence[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Replace methods of layers or losses inside the context, given as (object, name, function).

    The new method is put into the instance's `__dict__`, bypassing Keras's tracking. Then the
    instance gets back what was there: usually nothing, or the user's own method.
    """
    own = [vars(thing).get(name) for thing, name, _ in methods]
    try:
        for thing, name, method in methods:
            vars(thing)[name] = method
        yield
    finally:
        for (thing, name, _), method in zip(methods, own, strict=True):
            if method is None:
                vars(thing).pop(name, None)
            else:
                vars(thing)[name] = method
