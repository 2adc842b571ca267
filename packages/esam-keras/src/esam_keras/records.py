"""The units of a model, for those who choose a setting by its cost."""

import keras

from esam_core import Unit
from esam_keras.backends import current_backend
from esam_keras.units import records_of

__all__ = ["unit_records"]


def unit_records(model: keras.Model) -> tuple[Unit, ...]:
    """Return one record for each trained variable of a model, in Keras's order.

    These are `model.trainable_variables`. On TensorFlow and torch, Keras trains
    `model.trainable_weights`, which are the same unless the model overrides them; on torch without
    those that `requires_grad_(False)` has frozen.

    Args:
        model: a built model.

    Returns:
        Records named by the variables' paths, such as "dense/kernel". `cost` is the number of
        multiply-adds of the layer for one sample, as far as shapes determine it.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
        >>> [(unit.block, unit.shape, unit.cost) for unit in unit_records(model)]
        [('head', (4, 3), 12.0), ('head', (3,), 0.0)]
    """
    return records_of(model, current_backend().trained(model))
