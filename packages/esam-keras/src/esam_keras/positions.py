"""At how many positions a layer applies its kernel, such as the pixels of a convolution.

Keras keeps the shapes of the layers of Sequential and Functional models. Those of other layers, and
of inputs of any size, are recorded when shapes go through the model; see `recording`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import keras
from keras import tree

from esam_keras import compat
from esam_keras.methods import replace_methods

__all__ = ["parts", "positions", "recording"]

Shape = tuple[int | None, ...]
#: The shapes of the inputs and of the outputs of a call.
Shapes = tuple[list[Shape], list[Shape]]

#: Those of the first recorded call of each layer.
_RECORDED: WeakKeyDictionary[Any, Shapes] = WeakKeyDictionary()


@contextmanager
def recording(model: keras.Model) -> Iterator[None]:
    """Record the shapes of each layer's first call inside the context."""
    layers = [layer for layer in compat.flat_layers(model) if layer not in _RECORDED]
    with replace_methods([(layer, "call", _recorded(layer)) for layer in layers]):
        yield


def _recorded(layer: Any) -> Callable[..., Any]:
    """Return a layer's `call` that records its shapes."""
    original = layer.call

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        inputs = [*args, *kwargs.values()][:1]
        _RECORDED.setdefault(layer, (_shapes(inputs), _shapes(outputs)))
        return outputs

    return call


def _shapes(structure: Any) -> list[Shape]:
    """Return the shapes of the tensors in a structure."""
    leaves = [leaf for leaf in tree.flatten(structure) if hasattr(leaf, "shape")]
    return [tuple(compat.static_shape(leaf)) for leaf in leaves]


def parts(layer: Any, whole: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield a layer and all nested layers, each with the layer whose positions are its own.

    A layer of Keras, such as an RNN or attention, calls the layers inside it in its own way.

    Args:
        layer: any.
        whole: the layer of Keras in which it is, or None.
    """
    yield layer, whole or layer
    if whole is None and not isinstance(layer, keras.Model):
        definer = next(c for c in type(layer).__mro__ if "call" in vars(c))
        if definer.__module__.partition(".")[0] == "keras":
            whole = layer
    for inner in compat.sublayers(layer):
        yield from parts(inner, whole)


def positions(layer: Any, *, recorded: bool = True) -> float | None:
    """Return the number of positions at which a layer applies its kernel; None if unknown.

    Args:
        layer: any.
        recorded: whether to use recorded shapes where Keras does not know them.
    """
    kept = compat.inbound_tensors(layer)
    known = None if kept is None else _positions(layer, (_shapes(kept[0]), _shapes(kept[1])))
    if known is None and recorded and layer in _RECORDED:
        return _positions(layer, _RECORDED[layer])
    return known


def _positions(layer: Any, shapes: Shapes) -> float | None:
    """Return the number of positions, given the shapes of a call."""
    inputs, outputs = shapes
    if isinstance(layer, keras.layers.RNN | keras.layers.Bidirectional):
        places = inputs[0][1:2] if inputs else (None,)
    elif not outputs or len(outputs[0]) < 2:
        return None
    elif getattr(layer, "data_format", None) == "channels_first":
        places = outputs[0][2:]
    else:
        places = outputs[0][1:-1]
    sizes = [n for n in places if n is not None]
    return float(math.prod(sizes)) if len(sizes) == len(places) else None
