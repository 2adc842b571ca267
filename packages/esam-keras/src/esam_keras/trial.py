"""A model's total loss on a few made-up predictions: how losses are tried out before training."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src import backend

from esam_core.draws import uniforms
from esam_keras.losses import TRIED, weighted

__all__ = ["total_of_a_few"]


def total_of_a_few(
    model: keras.Model, data: Any, state: Any = None
) -> Callable[[str, np.ndarray], float]:
    """Return a function of (route, factors) that gives the total loss of `TRIED` samples.

    The targets are the first of the batch, the predictions are numbers in (0.1, 0.9) of the shape
    that the model gives: good as probabilities, as logits and as regressions. No layer is run.

    Args:
        model: compiled and built.
        data: a batch.
        state: JAX's state where it is not in the variables, else None.
    """

    def total(route: str, factors: np.ndarray) -> float:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x, y, sample_weight = tree.map_structure(_first, (x, y, sample_weight))
        y_pred = tree.map_structure(_made_up, _output_spec(model, x, state))
        with keras.StatelessScope(_mapping(model, state)):
            factor = ops.convert_to_tensor(factors)
            with weighted(model, route, (x, y, sample_weight), factor) as (x, y, weights):
                loss = model._compute_loss(
                    x=x, y=y, y_pred=y_pred, sample_weight=weights, training=True
                )
            return float(np.sum(ops.convert_to_numpy(loss)))

    return total


def _first(leaf: Any) -> Any:
    """Return the first samples, again from the start where there are too few."""
    if leaf is None:
        return None
    leaf = ops.convert_to_tensor(leaf)
    return ops.take(leaf, np.arange(TRIED) % int(leaf.shape[0]), axis=0)


def _output_spec(model: keras.Model, x: Any, state: Any) -> Any:
    """Return the shapes of the predictions for some inputs."""
    inputs = tree.map_structure(
        lambda leaf: (
            None
            if leaf is None
            else keras.KerasTensor(leaf.shape, backend.standardize_dtype(leaf.dtype))
        ),
        x,
    )
    if state is None:
        return backend.compute_output_spec(model, inputs)
    # Keras forgets the variables' values in `fit` on JAX; their shapes are in the state.
    return backend.compute_output_spec(
        lambda inputs: model.stateless_call(state[0], state[1], inputs)[0], inputs
    )


def _made_up(spec: Any) -> Any:
    """Return predictions of a shape, the same every time."""
    shape = tuple(TRIED if n is None else n for n in spec.shape)
    drawn = uniforms(int(np.prod(shape)), seed=0, count=0)
    return ops.cast(ops.convert_to_tensor((0.1 + 0.8 * drawn).reshape(shape)), spec.dtype)


def _mapping(model: keras.Model, state: Any) -> list[tuple[Any, Any]]:
    """Return the pairs of variables and values, the latter from JAX's state where there is one."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    if state is None:
        return [(variable, variable.value) for group in groups for variable in group]
    return [
        pair
        for group, values in zip(groups, state, strict=True)
        for pair in zip(group, values, strict=True)
    ]
