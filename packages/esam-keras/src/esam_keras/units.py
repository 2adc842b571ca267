"""A Keras model's trainable variables as `Unit` records, the inputs of samplers.

The blocks are the layers, in order of execution. This order is known for Sequential and Functional
models; for a subclassed model it is the order in which its layers were assigned. A layer of a
nested model is a separate block, "outer.inner"; any other layer that contains layers is one block.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from esam_core import Unit
from esam_core.units import names_a_norm
from esam_keras import compat

__all__ = ["has_moving_statistics", "records_of", "statistics_layers", "torch_wrappers"]

_NORMS = tuple(
    getattr(keras.layers, name)
    for name in (
        "BatchNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "RMSNormalization",
    )
    if hasattr(keras.layers, name)  # RMSNormalization exists since Keras 3.9
)


def records_of(model: keras.Model, trained: Sequence[Any]) -> tuple[Unit, ...]:
    """Return one record for each of a model's trained variables, in the given order.

    Args:
        model: a built model.
        trained: its trained variables.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
        >>> [(unit.block, unit.cost) for unit in records_of(model, model.trainable_variables[:1])]
        [('head', 12.0)]
    """
    places: dict[int, tuple[str, int, keras.layers.Layer, float]] = {}
    for depth, (block, layer, whole) in enumerate(_blocks(model)):
        for part in compat.flat_layers(layer) if whole else (layer,):
            positions = _positions(part, fallback=_positions(layer, fallback=1.0))
            for variable in compat.own_trainable_variables(part):
                places.setdefault(id(variable), (block, depth, part, positions))
    units, names = [], set[str]()
    for variable in trained:
        block, depth, owner, positions = places.get(id(variable), ("", 0, model, 1.0))
        name = variable.path
        while name in names:  # Keras allows several layers with one name
            name += "'"
        names.add(name)
        kind = _kind(owner, variable)
        cost = math.prod(variable.shape) * positions if _multiplies(kind, variable) else 0.0
        units.append(Unit(name, tuple(variable.shape), kind, block, float(cost), depth))
    return tuple(units)


def statistics_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers that normalise by batch statistics."""
    return [
        layer
        for layer in compat.flat_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def torch_wrappers(layers: Iterable[Any]) -> list[Any]:
    """Return the layers that wrap torch modules."""
    return [layer for layer in layers if isinstance(layer, keras.layers.TorchModuleWrapper)]


def has_moving_statistics(model: keras.Model) -> bool:
    """Return whether training updates moving statistics: in layers of Keras or wrapped modules."""
    return any(layer.trainable for layer in statistics_layers(model)) or any(
        compat.is_torch_batchnorm(part) and part.track_running_stats
        for layer in torch_wrappers(compat.flat_layers(model))
        for part in layer.module.modules()
    )


def _blocks(model: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield (block, layer, whether its sublayers belong to it) in the order of execution."""
    for layer in compat.direct_layers(model):
        block = f"{prefix}{layer.name}"
        if isinstance(layer, keras.Model):
            yield from _blocks(layer, prefix=f"{block}.")
        else:
            yield block, layer, True
    yield prefix.rstrip("."), model, False  # variables of the model itself


def _kind(layer: Any, variable: Any) -> str:
    """Return a variable's `Unit.kind`."""
    if isinstance(layer, _NORMS) or names_a_norm(type(layer).__name__):
        return "norm"
    if isinstance(layer, keras.layers.Embedding):
        return "embedding"
    if hasattr(layer, "module"):  # a torch module in Keras
        return _torch_kind(layer.module, variable)
    return "bias" if variable.name.endswith("bias") else "weight"


def _torch_kind(module: Any, variable: Any) -> str:
    """Return the kind of a wrapped torch module's parameter."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter is variable.value:
                if names_a_norm(type(part).__name__):
                    return "norm"
                if "Embedding" in type(part).__name__:
                    return "embedding"
                return "bias" if name.endswith("bias") else "weight"
    return "weight"


def _multiplies(kind: str, variable: Any) -> bool:
    """Return whether a variable is multiplied with the layer's input, and not just added."""
    return kind == "weight" and len(variable.shape) >= 2


def _positions(layer: Any, fallback: float) -> float:
    """Return the number of positions at which the layer applies its kernel; 1 if unknown."""
    found = compat.inbound_tensors(layer)
    if found is None:
        return fallback
    inputs, outputs = ([tuple(t.shape) for t in tensors] for tensors in found)
    if isinstance(layer, keras.layers.RNN | keras.layers.Bidirectional) and inputs:
        return float(inputs[0][1] or 1)
    if not outputs or len(outputs[0]) < 2:
        return fallback
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    places = outputs[0][2:] if channels_first else outputs[0][1:-1]
    return float(math.prod(n or 1 for n in places))
