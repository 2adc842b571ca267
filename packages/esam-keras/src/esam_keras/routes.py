"""Finding the route for losses per sample, before the first step.

The routes are those of `esam_keras.losses`. Losses other than plain Keras losses are evaluated on
artificial predictions, with the targets of one of the user's batches, so that no layer runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from esam_core import ESAMValueError
from esam_core.draws import uniforms
from esam_keras import compat
from esam_keras.losses import ADVICE, has_own_compute_loss, weigh_samples

__all__ = ["check_rows", "find_route"]

#: The number of samples whose factors are varied; few, to save time.
TRIED = 4

#: The total loss, as a float, by (route, factors of a batch's samples).
Total = Callable[[str, np.ndarray], float]


def find_route(model: keras.Model, needed: bool, data: Any, state: Any = None) -> str | None:
    """Return the route for a model's loss, testing it if it is not a plain Keras loss.

    Args:
        model: a compiled and built model, with its loss.
        needed: whether the step needs losses per sample.
        data: a batch.
        state: JAX's state if it is not in the variables, else None.

    Raises:
        ESAMValueError: losses per sample are needed but not available.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    b = int(next(leaf for leaf in tree.flatten(x) if leaf is not None).shape[0])
    total = _total_loss(model, data, b, state)
    losses = compat.compiled_losses(model)
    plain = all(type(loss).__call__ is keras.losses.Loss.__call__ for loss in losses)
    if not has_own_compute_loss(model):
        if not compat.has_compiled_loss(model):
            return None  # `add_loss` has no losses per sample
        if plain:
            return "values" if needed or _all_have_values(total, b) else None
    reasons = []
    for route in ("values", "weights"):
        if route == "values" and not (losses and plain):
            continue
        problem = _problem(total, route, b)
        if problem is None:
            return route
        reasons.append(problem)
    if not needed:
        return None
    raise ESAMValueError(
        "The loss must be linear in `sample_weight`, so that ESAM can compute each sample's loss. "
        f"Received: a loss that {reasons[-1] if reasons else 'has no value per sample'}. {ADVICE}"
    )


def check_rows(model: keras.Model, data: Any, k: int, state: Any = None) -> None:
    """Raise if a model cannot run on k samples alone.

    Args:
        model: a compiled and built model.
        data: a batch.
        k: >= 1.
        state: as in `find_route`.

    Raises:
        ESAMValueError: its inputs are sparse, or its batch size is fixed.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    if any(compat.is_sparse(leaf) for leaf in tree.flatten(x)):
        raise ESAMValueError(
            "Samples cannot be taken out of a sparse tensor: use gamma=1.0 without "
            "ascend=Part(...), so that steps use the whole batch, or dense inputs. Received: a "
            "sparse tensor among the inputs."
        )
    stateful = [layer for layer in compat.flat_layers(model) if getattr(layer, "stateful", False)]
    fixed = f"the stateful layer '{stateful[0].name}'" if stateful else _fixed_input(model)
    if fixed is None:
        return
    cause = None
    try:
        if not stateful:
            _output_spec(model, x, k, state)
            return
    except Exception as error:
        cause = error
    raise ESAMValueError(
        "A model with a fixed batch size cannot run on some samples alone: use gamma=1.0 without "
        "ascend=Part(...), so that steps use the whole batch, or leave the batch size open. "
        f"Received: {fixed}, and {k} samples."
    ) from cause


def _fixed_input(model: keras.Model) -> str | None:
    """Return a description of an input with a fixed batch size, or None."""
    for tensor in tree.flatten(getattr(model, "inputs", None) or ()):
        if tensor.shape[0] is not None:
            return f"the input '{tensor.name}' of shape {tuple(tensor.shape)}"
    return None


def _all_have_values(total: Total, b: int) -> bool:
    """Return whether the compiled losses have one value per sample."""
    try:
        total("values", np.ones(b, dtype=np.float32))
    except ESAMValueError:
        return False
    return True


def _problem(total: Total, route: str, b: int) -> str | None:
    """Return the problem of a route, or None: the loss must be affine in every factor."""
    n = min(TRIED, b)
    rows = np.eye(n, b, dtype=np.float32)
    mixed = np.array([0.5, 4.0, 2.0, 0.25], dtype=np.float32)[:n]
    try:
        zero = total(route, np.zeros(b, dtype=np.float32))
        alone = [total(route, row) - zero for row in rows]
        together = total(route, mixed @ rows) - zero
    except ESAMValueError as error:
        return f"has no value per sample ({error})"
    noise = 1e-5 * (abs(zero) + abs(together))
    size = max(map(abs, (*alone, together)))
    if size <= noise:
        return "does not depend on `sample_weight`"
    if abs(float(np.dot(mixed, alone)) - together) > 1e-3 * size + noise:
        return "is not linear in `sample_weight`"
    return None


# -- the loss of artificial predictions ------------------------------------------------------------


def _total_loss(model: keras.Model, data: Any, b: int, state: Any) -> Total:
    """Return a function that computes the total loss of a batch with given factors.

    The predictions are numbers in (0.1, 0.9) of the model's output shape, which are valid as
    probabilities, logits and regressions.
    """

    @functools.cache
    def found() -> Any:
        return _predictions_spec(model, data, b, state)

    def total(route: str, factors: np.ndarray) -> float:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y, sample_weight = tree.map_structure(
            lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), (y, sample_weight)
        )
        y_pred = tree.map_structure(lambda spec: _artificial_predictions(spec, b), found())
        with keras.StatelessScope(_mapping(model, state)):
            factor = ops.convert_to_tensor(factors)
            with weigh_samples(model, route, (x, y, sample_weight), factor) as (x, y, weights):
                loss = compat.total_loss(model, x, y, y_pred, weights)
            return float(np.sum(ops.convert_to_numpy(loss)))

    return total


def _predictions_spec(model: keras.Model, data: Any, b: int, state: Any) -> Any:
    """Return tensors or specifications with the predictions' shapes and dtypes."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    try:
        return _output_spec(model, x, b, state)
    except Exception:
        # A model that is not compiled may read the values of its tensors, which have none here.
        if state is not None:
            return model.stateless_call(state[0], state[1], x)[0]
        with keras.StatelessScope():
            return model(x)


def _output_spec(model: keras.Model, x: Any, rows: int, state: Any) -> Any:
    """Return the shapes of the predictions for the given number of rows."""
    inputs = tree.map_structure(
        lambda leaf: (
            None
            if leaf is None
            else keras.KerasTensor(
                (rows, *leaf.shape[1:]),
                keras.backend.standardize_dtype(leaf.dtype),
                sparse=compat.is_sparse(leaf),
            )
        ),
        x,
    )
    if state is None:
        return compat.output_spec(model, inputs)
    # In `fit` on JAX Keras clears the variables' values; their shapes are in the state.
    return compat.output_spec(
        lambda inputs: model.stateless_call(state[0], state[1], inputs)[0], inputs
    )


def _artificial_predictions(spec: Any, b: int) -> Any:
    """Return artificial predictions of a shape, always the same."""
    shape = tuple(b if n is None else n for n in spec.shape)
    drawn = uniforms(int(np.prod(shape)), seed=0, count=0)
    dtype = keras.backend.standardize_dtype(spec.dtype)
    return ops.cast(ops.convert_to_tensor((0.1 + 0.8 * drawn).reshape(shape)), dtype)


def _mapping(model: keras.Model, state: Any) -> list[tuple[Any, Any]]:
    """Return the pairs of variables and values, from JAX's state if there is one."""
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
