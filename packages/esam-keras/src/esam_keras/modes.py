"""What a layer does differently in one of the passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from esam_keras.units import statistics_layers

__all__ = ["running_statistics"]


@contextmanager
def running_statistics(model: keras.Model, *, when: bool) -> Iterator[None]:
    """Let BatchNormalization use its moving statistics: one sample has none of its own."""
    layers = statistics_layers(model) if when else []
    for layer in layers:
        vars(layer)["call"] = _inference(layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _inference(layer: Any) -> Any:
    """Return a layer's `call` in inference mode."""
    original = layer.call

    def call(*args: Any, training: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
        return original(*args, training=False, **kwargs)

    return call
