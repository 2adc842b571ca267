"""A Keras model's trainable variables as `Unit` records, the inputs of samplers.

The blocks are the layers, in order of execution. This order is known for Sequential and Functional
models; for a subclassed model it is the order in which its layers were assigned. A layer of a
nested model is a separate block, "outer.inner"; any other layer that contains layers is one block.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from esam_core import Unit
from esam_core.units import names_a_norm
from esam_keras import compat
from esam_keras.positions import parts, positions

__all__ = [
    "has_moving_statistics",
    "is_stored",
    "records_of",
    "statistics_layers",
    "torch_modules",
    "torch_norms",
    "torch_wrappers",
    "without_costs",
]

_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
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
    units, names = [], set[str]()
    for variable, place in _placed(model, trained, recorded=True):
        name = variable.path
        while name in names:  # Keras allows several layers with one name
            name += "'"
        names.add(name)
        kind, shape = _kind(place.layer, variable), tuple(variable.shape)
        times = place.fallback if place.positions is None else place.positions
        cost = math.prod(shape) * times if _multiplies(kind, variable) else 0.0
        units.append(Unit(name, shape, kind, place.block, float(cost), place.depth))
    return tuple(units)


def without_costs(
    model: keras.Model, trained: Sequence[Any], *, recorded: bool = True
) -> list[str]:
    """Return the paths of the weights whose cost is only a guess.

    Args:
        model: a built model.
        trained: its trained variables.
        recorded: whether recorded shapes count; see `esam_keras.positions`.
    """
    return [
        variable.path
        for variable, place in _placed(model, trained, recorded=recorded)
        if place.positions is None and _multiplies(_kind(place.layer, variable), variable)
    ]


class _Place(NamedTuple):
    """The place of a variable in a model.

    Args:
        block: the name of its block.
        depth: the number of blocks before.
        layer: its layer.
        positions: at how many positions the layer applies it; None if unknown.
        fallback: a guess: those of the block.
    """

    block: str
    depth: int
    layer: Any
    positions: float | None
    fallback: float = 1.0


def _placed(
    model: keras.Model, trained: Sequence[Any], *, recorded: bool
) -> list[tuple[Any, _Place]]:
    """Return each variable with its place in the model."""
    places: dict[int, _Place] = {}
    for depth, (block, layer, whole) in enumerate(_blocks(model)):
        of_block = positions(layer, recorded=recorded)
        for part, source in parts(layer) if whole else [(layer, layer)]:
            variables = compat.own_trainable_variables(part)
            found = positions(source, recorded=recorded) if variables else None
            for variable in variables:
                place = _Place(block, depth, part, found, of_block or 1.0)
                places.setdefault(id(variable), place)
    of_the_model = _Place("", 0, model, None)
    return [(variable, places.get(id(variable), of_the_model)) for variable in trained]


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


def torch_modules(layers: Iterable[Any]) -> list[Any]:
    """Return the torch modules that layers wrap, and the modules inside them."""
    return [part for layer in torch_wrappers(layers) for part in layer.module.modules()]


def torch_norms(model: keras.Model) -> list[Any]:
    """Return the wrapped torch modules of a model that normalise by batch statistics."""
    return [p for p in torch_modules(compat.flat_layers(model)) if compat.is_torch_batchnorm(p)]


def has_moving_statistics(model: keras.Model) -> bool:
    """Return whether training updates moving statistics: in layers of Keras or wrapped modules."""
    return any(layer.trainable for layer in statistics_layers(model)) or any(
        part.track_running_stats for part in torch_norms(model)
    )


def is_stored(variable: Any) -> bool:
    """Return whether a variable's gradient is a value to be stored, as in float8 training."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


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
