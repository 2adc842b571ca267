"""The loss of artificial predictions, to learn about a model's loss before the first step.

The targets are those of one of the user's batches. No layer runs, except in models that read the
values of their tensors.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from esam_core import ESAMTypeError
from esam_core.draws import uniforms
from esam_keras import compat
from esam_keras.losses import weigh_samples
from esam_keras.noise import global_noise_kept
from esam_keras.positions import recording
from esam_keras.rows import first_input, row_count

__all__ = ["Trial", "output_spec", "predictions"]

#: The number of predictions that differ, for speed: a prime, so that rows differ.
DRAWN = 10_007


class Trial:
    """Evaluates a model's total loss for artificial predictions.

    These are numbers in (0.1, 0.9) of the model's output shape, which are valid as probabilities,
    logits and regressions.

    Args:
        model: a compiled and built model, with its loss.
        data: a batch.
        state: JAX's state if it is not in the variables, else None.
        context: returns the context of one evaluation, which leaves random generators as they were.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Any,
        state: Any = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self._data = data
        self._state = state
        self._context = context
        self.b = int(first_input(self._x).shape[0])

    @property
    def _x(self) -> Any:
        return keras.utils.unpack_x_y_sample_weight(self._data)[0]

    def total(self, route: str, factors: np.ndarray, redrawn: np.ndarray | None = None) -> float:
        """Return the total loss, with sample i weighted by factor_i.

        Args:
            route: see `esam_keras.losses`.
            factors: (b,).
            redrawn: (b,) booleans, the samples with other predictions than usual; None for none.

        Raises:
            ESAMTypeError: the loss uses results of a call of the model, which did not run.
        """
        model = self.model
        if redrawn is None:
            redrawn = np.zeros(self.b, dtype=bool)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(self._data)
        y, sample_weight = tree.map_structure(
            lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), (y, sample_weight)
        )
        y_pred = self._predictions(redrawn)
        with (
            self._context(),
            global_noise_kept(),
            keras.StatelessScope(_mapping(model, self._state)),
            _values_only(),
        ):
            factor = ops.convert_to_tensor(factors.astype(np.float32))
            with weigh_samples(model, route, (x, y, sample_weight), factor) as (x, y, weights):
                loss = compat.total_loss(model, x, y, y_pred, weights)
            return float(np.sum(ops.convert_to_numpy(loss)))

    @functools.cached_property
    def _spec(self) -> Any:
        """Tensors or specifications with the predictions' shapes and dtypes."""
        return predictions(self.model, self._x, self.b, self._state)

    @functools.cached_property
    def outputs_with_rows(self) -> tuple[bool, ...]:
        """Which outputs have one row per sample, and not just as many rows by chance.

        Their number of rows doubles with the number of samples.
        """
        return tuple(
            row_count(spec) in (None, self.b)
            and (self._doubled is None or row_count(twice) in (None, 2 * self.b))
            for spec, twice in self._pairs
        )

    @property
    def mixed_output(self) -> tuple[int, ...] | None:
        """The shape of an output with several axes of the batch's size, such as (b, b) logits."""
        for spec, twice in self._pairs:
            if row_count(spec) != row_count(twice) and spec.shape[1:] != twice.shape[1:]:
                return tuple(spec.shape)
        return None

    @property
    def _pairs(self) -> list[tuple[Any, Any]]:
        """The specifications of each output, for the batch and for twice as many samples."""
        flat = tree.flatten(self._spec)
        return list(zip(flat, flat if self._doubled is None else self._doubled, strict=True))

    @functools.cached_property
    def _doubled(self) -> list[Any] | None:
        """The predictions' specifications for twice as many samples; None if there are none."""
        try:
            return tree.flatten(output_spec(self.model, self._x, 2 * self.b, self._state))
        except Exception:  # for example, the batch size is fixed
            return None

    def _predictions(self, redrawn: np.ndarray) -> Any:
        """Return artificial predictions, always the same for the same arguments."""
        flat = zip(tree.flatten(self._spec), self.outputs_with_rows, strict=True)
        drawn = [_draw(spec, redrawn, has_rows) for spec, has_rows in flat]
        return tree.pack_sequence_as(self._spec, drawn)


def predictions(model: keras.Model, x: Any, b: int, state: Any) -> Any:
    """Return the shapes of the predictions for b samples, or predictions."""
    try:
        return output_spec(model, x, b, state)
    except Exception:
        # A model that is not compiled may read the values of its tensors, which have none here.
        with recording(model), global_noise_kept(), keras.StatelessScope():
            if state is not None:
                return model.stateless_call(state[0], state[1], x)[0]
            return model(x)


def output_spec(model: keras.Model, x: Any, rows: int, state: Any) -> Any:
    """Return the shapes of the predictions for the given number of rows of the inputs."""
    b = row_count(first_input(x))

    def spec(leaf: Any) -> Any:
        if leaf is None:
            return None
        shape = (rows, *leaf.shape[1:]) if row_count(leaf) == b else leaf.shape
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        return keras.KerasTensor(shape, dtype, sparse=compat.is_sparse(leaf))

    inputs = tree.map_structure(spec, x)
    with recording(model), global_noise_kept():
        if state is None:
            # As Keras builds it. In training, torch modules would update their statistics.
            return compat.output_spec(lambda inputs: model(inputs, training=False), inputs)
        mode = {"training": False} if compat.takes_training(model) else {}
        # In `fit` on JAX Keras clears the variables' values; their shapes are in the state.
        return compat.output_spec(
            lambda inputs: model.stateless_call(state[0], state[1], inputs, **mode)[0], inputs
        )


def _values_only() -> AbstractContextManager[Any]:
    """Return a context that raises for torch tensors without values, whose use Keras allows.

    They are left where a `call` stored them that only computed shapes.
    """
    if keras.backend.backend() != "torch":
        return nullcontext()  # the others raise themselves
    import torch

    class ValuesOnly(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            leaves = tree.flatten((args, kwargs or {}))
            if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
                raise ESAMTypeError("The loss reads a tensor without values, stored by `call`.")
            return func(*args, **(kwargs or {}))

    return ValuesOnly()


def _draw(spec: Any, redrawn: np.ndarray, has_rows: bool) -> Any:
    """Return artificial predictions of a shape; an output without rows is never redrawn."""
    if not hasattr(spec, "shape"):
        return spec  # None or a number
    shape = tuple(len(redrawn) if n is None else n for n in spec.shape)
    drawn = _numbers(shape, seed=0)
    if has_rows and redrawn.any():
        drawn[redrawn] = _numbers(shape, seed=1)[redrawn]
    dtype = keras.backend.standardize_dtype(spec.dtype)
    return ops.cast(ops.convert_to_tensor(drawn), dtype)


def _numbers(shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """Return numbers in (0.1, 0.9) of a shape."""
    n = int(np.prod(shape))
    drawn = uniforms(min(n, DRAWN), seed=seed, count=0)
    return np.resize((0.1 + 0.8 * drawn).astype(np.float32), shape)


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
