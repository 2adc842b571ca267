"""The step on TensorFlow: a `tf.function` for each plan."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from esam_core import ESAMRuntimeError
from esam_keras.commit import step
from esam_keras.distribution import refuse_distribution
from esam_keras.plan import Drawn, Plan

__all__ = [
    "ARGUMENTS",
    "NATIVE",
    "eager_step",
    "is_tracing",
    "make_train_function",
    "refuse",
    "step",
]

#: What Keras hands to `train_step` on this backend.
ARGUMENTS = ("data",)

Tensor = Any


class Native:
    """The native parts of the passes: see `esam_keras.passes.Backend`."""

    def gradients(
        self,
        function: Callable[[list[Tensor]], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        """Return the gradients, and the function's second result."""
        watched = list(variables)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(watched)
            value, rest = function(watched)
        return tape.gradient(value, watched), rest

    def dense(self, gradient: Tensor) -> Tensor:
        """Return a gradient as a tensor: look-ups give one as slices."""
        return tf.convert_to_tensor(gradient)

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        """Return masks of single weights."""
        return [
            tf.random.stateless_uniform(theta.shape, seed=tf.add(seed, [0, t])) < beta
            for t, theta in enumerate(like)
        ]

    def pass_context(self, model: keras.Model, running: bool) -> AbstractContextManager[None]:
        """Return no context: all state is Keras's."""
        return nullcontext()

    def value(self, variable: Any) -> Tensor:
        """Return a variable's value as a tensor that later assignments leave alone."""
        return tf.convert_to_tensor(variable.value)

    def whole_step(self, model: keras.Model) -> AbstractContextManager[None]:
        """Return no context: all state is Keras's."""
        return nullcontext()

    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Make the update."""
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    def keep_if(self, ok: Tensor, commit: Callable[[], None]) -> None:
        """Commit if the step is to be kept."""

        def kept() -> Any:
            commit()
            return tf.constant(True)

        tf.cond(ok, kept, lambda: tf.constant(False))


NATIVE = Native()


def refuse(model: keras.Model) -> None:
    """Raise where this backend cannot do ESAM's step."""
    strategy = model._distribute_strategy
    if strategy is not None or tf.distribute.has_strategy():
        raise ESAMRuntimeError(
            "ESAM does not work under a `tf.distribute` strategy: each replica would climb and "
            "select on its own shard inside one traced function, where neither masks nor the "
            "selected samples can be told apart. Use `keras.distribution.DataParallel` on the JAX "
            f"backend. Received: {strategy or tf.distribute.get_strategy()!r}."
        )
    refuse_distribution()
    for layer in model._flatten_layers():
        if isinstance(layer.call, tf.types.experimental.GenericFunction):
            raise ESAMRuntimeError(
                "ESAM does not work with a `call` made by `tf.function`: it reads the variables "
                "themselves, and not the perturbed values, and would not be trained. Leave the "
                f"decorator out: `fit` compiles the whole step. Received: layer {layer.name!r}."
            )


def is_tracing(data: Any) -> bool:  # noqa: ARG001
    """Say whether a `tf.function` of the user's own is being traced."""
    return tf.inside_function()


def eager_step(training: Any, data: Any) -> dict[str, Any]:
    """Make one step uncompiled."""
    training.prepare(data)
    count = int(training.esam.count.numpy())
    drawn = training.draw(count, data, compiled=False)
    with training.stepping(drawn.plan, _device(drawn.inputs)) as current:
        logs = step(training, current, data)
    training.finish(count, drawn, current.report)
    training.esam.count.assign(count + 1)
    return logs


def _device(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the inputs as tensors."""
    return {name: tf.convert_to_tensor(value) for name, value in inputs.items()}


def make_train_function(training: Any) -> Callable[[Iterator[Any]], dict[str, Any]]:
    """Return what `fit` calls: iterator to logs."""
    model = training.model
    compiled = not model.run_eagerly
    functions: dict[Plan, Callable[..., Any]] = {}
    training.compiled_steps = functions

    def for_plan(plan: Plan) -> Callable[..., Any]:
        @tf.autograph.experimental.do_not_convert
        def one_step(data: Any, inputs: Any) -> Any:
            with training.stepping(plan, inputs) as current:
                logs = model.train_step(data)
                return logs, current.report

        if compiled:
            one_step = tf.function(one_step, reduce_retracing=True, jit_compile=model.jit_compile)
        if hasattr(model, "_autoconvert_optionals"):
            return lambda data, inputs: one_step(_without_optionals(data), inputs)
        return one_step

    def train_function(iterator: Iterator[Any]) -> dict[str, Any]:
        logs = None
        for _, data in zip(range(model.steps_per_execution), iterator, strict=False):
            training.prepare(data)
            count = int(training.esam.count.numpy())
            drawn: Drawn = training.draw(count, data, compiled=compiled)
            if drawn.plan not in functions:
                functions[drawn.plan] = for_plan(drawn.plan)
            logs, report = functions[drawn.plan](data, _device(drawn.inputs))
            training.finish(count, drawn, report)
            training.esam.count.assign(count + 1)
        if logs is None:
            raise StopIteration
        return training.shown(logs)

    return train_function


def _without_optionals(data: Any) -> Any:
    """Return the data with absent optional inputs as None."""
    return keras.tree.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )
