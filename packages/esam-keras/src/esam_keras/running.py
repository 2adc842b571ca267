"""Normalisation by running statistics, for a forward of one of several samples."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras

from esam_keras.methods import replace_methods
from esam_keras.units import statistics_layers, torch_norms

__all__ = ["running_statistics"]


@contextmanager
def running_statistics(model: keras.Model, *, when: bool) -> Iterator[None]:
    """Let BatchNormalization use its moving statistics: one sample has no batch statistics.

    This includes wrapped torch modules.
    """
    with ExitStack() as stack:
        if when:
            layers = statistics_layers(model)
            methods = [(layer, "call", _inference(layer)) for layer in layers]
            stack.enter_context(replace_methods(methods))
            for part in torch_norms(model):
                stack.callback(part.register_forward_pre_hook(_to_inference).remove)
                after = part.register_forward_hook(_to_training, always_call=True)
                stack.callback(after.remove)
        yield


def _inference(layer: Any) -> Any:
    """Return a layer's `call` in inference mode."""
    original = layer.call

    def call(*args: Any, training: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
        return original(*args, training=False, **kwargs)

    return call


def _to_inference(module: Any, _: Any) -> None:
    """Before a torch module's forward: let it normalise by its running statistics."""
    module.eval()


def _to_training(module: Any, *_: Any) -> None:
    """After its forward: set it to training again."""
    module.train()
