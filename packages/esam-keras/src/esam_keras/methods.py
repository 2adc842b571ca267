"""Which methods of a model are the user's own."""

from typing import Any

import keras

__all__ = ["has_own"]


def has_own(model: Any, name: str) -> bool:
    """Return whether a model, or its class, has its own version of a method of `keras.Model`."""
    return name in vars(model) or getattr(type(model), name) is not getattr(keras.Model, name)
