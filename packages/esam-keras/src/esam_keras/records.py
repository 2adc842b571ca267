"""The units of a model, for those who choose a setting by its cost."""

from typing import Any

import keras

from esam_core import Unit
from esam_keras.backends import current_backend
from esam_keras.rows import first_input
from esam_keras.trial import predictions
from esam_keras.units import records_of, without_costs
from esam_keras.warning import warn_user

__all__ = ["unit_records"]


def unit_records(model: keras.Model, inputs: Any = None) -> tuple[Unit, ...]:
    """Return one record for each trained variable of a model, in Keras's order.

    These are `model.trainable_variables`. On TensorFlow and torch, Keras trains
    `model.trainable_weights`, which are the same unless the model overrides them; on torch without
    those that `requires_grad_(False)` has frozen.

    Args:
        model: a built model; with `inputs`, any.
        inputs: a batch of inputs, of which only the shapes are used. A model that is subclassed, or
            has inputs of any size, needs them before its first step: without them, some costs are
            guesses, with a warning. Default None.

    Returns:
        Records named by the variables' paths, such as "dense/kernel". `cost` is the number of
        multiply-adds of the layer for one sample, as far as shapes determine it.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
        >>> [(unit.block, unit.shape, unit.cost) for unit in unit_records(model)]
        [('head', (4, 3), 12.0), ('head', (3,), 0.0)]
    """
    backend = current_backend()
    if inputs is not None:
        with backend.checks_context(model):
            predictions(model, inputs, int(first_input(inputs).shape[0]), None)
    trained = backend.trained(model)
    names = without_costs(model, trained)
    if names:
        hint = "pass a batch of inputs, unit_records(model, x)" if inputs is None else "name blocks"
        warn_user(
            f"The costs of {', '.join(names)} are guesses, because the shapes of their layers are "
            f"unknown. If you choose by cost, {hint}."
        )
    return records_of(model, trained)
