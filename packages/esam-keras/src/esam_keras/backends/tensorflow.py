"""TensorFlow: a `tf.function` for each plan."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_keras import compat
from esam_keras.backends.assigning import AssigningBackend
from esam_keras.backends.base import Cut, ModelTraining, Unknown, refuse_distribution
from esam_keras.backends.tensorflow_noise import DrawsOfStep
from esam_keras.backends.tensorflow_scope import (
    TensorFlowScope,
    refuse_checkpointed,
    refuse_reads,
)
from esam_keras.evaluation import Variables
from esam_keras.handover import StepVariables, applying
from esam_keras.perturbation import perturb
from esam_keras.plan import Plan

__all__ = ["BACKEND", "TensorFlowBackend"]

Tensor = Any


class TensorFlowBackend(AssigningBackend):
    """Keras on TensorFlow; see `esam_keras.backends.base.Backend`."""

    perturb = staticmethod(perturb)

    pass_scope = TensorFlowScope

    def gradients(
        self,
        function: Callable[[list[Tensor], Cut], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[list[Tensor]], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        watched = list(variables)
        leaves: list[tuple[int, Tensor]] = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:

            def cut(place: int, value: Tensor) -> Tensor:
                leaf = tf.stop_gradient(value)
                tape.watch(leaf)
                leaves.append((place, leaf))
                return leaf

            tape.watch(watched)
            value, rest = function(watched, cut)
        found = tape.gradient(value, watched + [leaf for _, leaf in leaves])
        for (place, _), g in zip(leaves, found[len(watched) :], strict=True):
            if g is not None:
                both = [self.dense(h) for h in (found[place], g) if h is not None]
                found[place] = tf.add_n(both)
        return found[: len(watched)], rest

    def without_gradient(self, value: Tensor) -> Tensor:
        return tf.stop_gradient(value)

    def dense(self, gradient: Tensor) -> Tensor:
        return tf.convert_to_tensor(gradient)  # embeddings give slices

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        return [
            tf.random.stateless_uniform(theta.shape, seed=tf.add(seed, [0, t])) < beta
            for t, theta in enumerate(like)
        ]

    def inputs_of_pass(self, x: Any) -> Any:
        return x  # tensors are not written to

    def value(self, variable: Any) -> Tensor:
        return tf.convert_to_tensor(variable.value)

    def whole_step(
        self, training: ModelTraining, variables: Variables
    ) -> AbstractContextManager[Unknown]:
        return nullcontext(_Uncompiled(training, variables.trainable))

    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: StepVariables) -> None:
        # As Keras's trainer: an optimizer may override it. It makes a tuple of the variables.
        with applying():
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

    def keep_if(self, ok: Tensor, commit: Callable[[], None]) -> None:
        def commit_and_confirm() -> Any:
            commit()
            return tf.constant(True)

        tf.cond(ok, commit_and_confirm, lambda: tf.constant(False))

    # -- a step of a model -------------------------------------------------------------------------

    def refuse(self, model: keras.Model) -> None:
        strategy = compat.distribution_strategy(model)
        if strategy is not None or tf.distribute.has_strategy():
            raise ESAMRuntimeError(
                "ESAM does not work under a `tf.distribute` strategy: each replica would perturb "
                "and select on its own shard inside one traced function, where neither masks nor "
                "selected samples can be identified. Use `keras.distribution.DataParallel` on the "
                f"JAX backend. Received: {strategy or tf.distribute.get_strategy()!r}."
            )
        refuse_distribution()
        for layer in compat.flat_layers(model):
            _refuse_raw_variables(layer)
            refuse_checkpointed(layer)

    def trained(self, model: keras.Model) -> list[Any]:
        return list(model.trainable_weights)  # a model may override it, to train only some

    def checks_context(self, model: keras.Model) -> AbstractContextManager[Any]:
        return nullcontext()  # on symbolic tensors

    def is_tracing(self, *arguments: Any) -> bool:
        return tf.inside_function()

    def run_counted(self, training: ModelTraining, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a step as on torch too; warn here, where no function is traced."""
        logs = super().run_counted(training, *args, **kwargs)
        training.noise.warn()
        return logs

    def make_train_function(
        self, training: ModelTraining
    ) -> Callable[[Iterator[Any]], dict[str, Any]]:
        model = training.model
        compiled = not model.run_eagerly
        functions: dict[Plan, Callable[..., Any]] = {}

        def step(plan: Plan, *arguments: Any) -> Any:
            if plan not in functions:
                functions[plan] = step_function(training, plan)
            return functions[plan](*arguments)

        def train_function(iterator: Iterator[Any]) -> dict[str, Any]:
            logs = None
            for _, data in zip(range(model.steps_per_execution), iterator, strict=False):
                if compat.reads_optionals(model):
                    data = _without_optionals(data)
                logs = self.run_counted(training, data, step, compiled=compiled)
            if logs is None:
                raise StopIteration
            return logs

        return train_function


class _Uncompiled(Unknown):
    """Refuses reads of trained weights by what is compiled before; finds noise that is not kept."""

    def __init__(self, training: ModelTraining, trained: Sequence[Any]) -> None:
        super().__init__(training.model, training.noise)
        self._own = {id(v.value): v for v in trained}  # outside a pass: the `tf.Variable`s
        self._draws = DrawsOfStep(training.noise)

    @contextmanager
    def one_pass(self, *, running: bool, records: bool, again: bool = False) -> Iterator[None]:
        with (
            super().one_pass(running=running, records=records, again=again),
            self._draws.one_pass(),
            refuse_reads(self._own),
        ):
            yield


def _refuse_raw_variables(layer: Any) -> None:
    """Raise if a layer has a `tf.Variable`, which each pass of a step would change again.

    Keras's own layers may: those of preprocessing layers change in `adapt`, not in calls.
    """
    if type(layer).__module__.partition(".")[0] == "keras":
        return
    for name, value in compat.attributes(layer).items():
        values = list(value.values()) if isinstance(value, dict) else value
        held = values if isinstance(values, list | tuple) else [value]
        if any(isinstance(part, tf.Variable) for part in held):
            raise ESAMTypeError(
                "State of a layer must be in Keras variables: each pass of a step would change a "
                "`tf.Variable` again. Use `self.add_weight(..., trainable=False)`. Received: "
                f"attribute {name!r} of layer {layer.name!r}."
            )


def step_function(training: ModelTraining, plan: Plan) -> Callable[[Any, Any], Any]:
    """Return the function of inputs and a batch that runs a step of one plan."""
    model = training.model
    step: Callable[[Any, Any], Any] = functools.partial(training.step, plan)
    if not model.run_eagerly:
        # TensorFlow warns if a function is traced repeatedly. It identifies functions by their
        # code, but a partial by its object; there is deliberately one for each plan.
        step = tf.function(
            step, autograph=False, reduce_retracing=True, jit_compile=model.jit_compile
        )
    return step


def _without_optionals(data: Any) -> Any:
    """Return the data with absent optional inputs as None."""
    return keras.tree.map_structure(
        lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data
    )


#: The only instance.
BACKEND = TensorFlowBackend()
