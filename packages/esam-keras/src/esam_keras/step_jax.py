"""The step on JAX: stateless, jitted for each plan.

With `keras.distribution.DataParallel` the devices share one theta. The compiled step is that of one
device: the gradient, its norm, epsilon and the selected samples are those of the whole batch, so
that m-sharpness has m = b, and not a climb on each device's shard.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import keras

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_keras.metrics import logs_unless, metrics_after
from esam_keras.passes import State, Step, batch_size, loss_scale, mapped
from esam_keras.plan import Drawn, Plan

__all__ = ["ARGUMENTS", "eager_step", "is_tracing", "make_train_function", "refuse", "step"]

#: What Keras hands to `train_step` on this backend.
ARGUMENTS = ("state", "data")

#: What the state of Keras's JAX trainer consists of.
STATE = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)

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
        gradients, rest = jax.grad(function, has_aux=True)(list(variables))
        return gradients, rest

    def dense(self, gradient: Tensor) -> Tensor:
        """Return the gradient: here all are dense."""
        return gradient

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        """Return masks of single weights."""
        words = jax.lax.bitcast_convert_type(seed, jnp.uint32)
        keys = jax.random.split(jax.random.wrap_key_data(words, impl="threefry2x32"), len(like))
        return [
            jax.random.uniform(key, theta.shape) < beta
            for key, theta in zip(keys, like, strict=True)
        ]

    def pass_context(self, model: keras.Model, running: bool) -> AbstractContextManager[None]:
        """Return no context: all state is Keras's."""
        return nullcontext()


NATIVE = Native()


def refuse(model: keras.Model) -> None:  # noqa: ARG001  # as every backend's
    """Raise where this backend cannot do ESAM's step."""
    # Keras 3.10 has no such mode.
    if hasattr(keras.config, "is_nnx_enabled") and keras.config.is_nnx_enabled():
        raise ESAMRuntimeError(
            "ESAM does not work in Keras's NNX mode, whose variables change in place: the passes "
            "of a step need them unchanged. Disable it: KERAS_NNX_ENABLED=false."
        )


def is_tracing(state: Any, data: Any) -> bool:
    """Say whether a compiler of the user's own is at work."""
    return any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves((state, data))
    )


def step(training: Any, current: Any, state: Any, data: Any) -> tuple[dict[str, Any], Any]:
    """Return (logs, state) after one step: the twin of Keras's `train_step`."""
    model, esam = training.model, training.esam
    trainable, non_trainable, variables, metrics = state
    batch = keras.utils.unpack_x_y_sample_weight(data)
    with keras.StatelessScope(mapped(model.optimizer.variables, variables)):
        scale = loss_scale(model.optimizer)
    outcome = Step(
        NATIVE,
        model,
        esam.config,
        current.plan,
        current.inputs,
        training.route,
        State(trainable, non_trainable, metrics),
        batch,
        scale,
        training.fixed,
    ).run()
    gradients = [
        jnp.zeros_like(v) if g is None else g
        for g, v in zip(outcome.gradients, trainable, strict=True)
    ]
    with esam.stepping():
        moved, updated = model.optimizer.stateless_apply(variables, gradients, trainable)
    updated = _with_own(training, updated, variables, outcome.report, batch_size(batch[0]))
    logs, counted = metrics_after(model, outcome.ascent, batch)
    after = (moved, outcome.ascent.state.non_trainable, updated, counted)
    report = outcome.report
    if esam.config.on_nonfinite != "propagate":
        ok = jnp.logical_and(outcome.finite, _all_finite(gradients))
        after = _chosen(training, ok, after, state)
        logs = logs_unless(model, ok, logs, metrics)
        report = {**report, "ok": ok}
    current.report = report
    sums = [after[2][place] for place in _places(training)[1:]]
    return training.with_means(logs, sums), after


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Say whether everything is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(t)) for t in tensors]))


def _places(training: Any) -> list[int]:
    """Return the places of the counter and the log sums among the optimizer's variables."""
    at = {id(v): i for i, v in enumerate(training.model.optimizer.variables)}
    return [at[id(v)] for v in (training.esam.count, *training.esam._log_sums)]


def _with_own(
    training: Any, variables: Sequence[Tensor], before: Sequence[Tensor], report: Any, b: Any
) -> list[Tensor]:
    """Return the optimizer's variables with the counter advanced and the log sums added to."""
    result = list(variables)
    places = _places(training)
    sums = training.log_sums([before[place] for place in places[1:]], report, b)
    for place, value in zip(places, [before[places[0]] + 1, *sums], strict=True):
        result[place] = jnp.asarray(value, dtype=before[place].dtype)
    return result


def _chosen(training: Any, finite: Tensor, after: Any, before: Any) -> Any:
    """Return the state after the step if it was finite, else the one before.

    A step that is skipped counts; one that raises has not been.
    """
    chosen = jax.tree_util.tree_map(lambda a, b: jnp.where(finite, a, b), after, tuple(before))
    if training.esam.config.on_nonfinite == "skip":
        place = _places(training)[0]
        chosen[2][place] = after[2][place]
    return chosen


def eager_step(training: Any, state: Any, data: Any) -> tuple[dict[str, Any], Any]:
    """Make one step uncompiled, drawing its mask from the counter in the state."""
    if len(state) != 4:
        raise ESAMTypeError(f"`state` must be ({', '.join(STATE)}). Received: {len(state)} parts.")
    training.prepare(data, state)
    count = int(state[2][_places(training)[0]])
    drawn = training.draw(count, data, compiled=False)
    with training.stepping(drawn.plan, _device(drawn.inputs)) as current:
        logs, state = step(training, current, state, data)
    training.finish(count, drawn, current.report)
    return logs, state


def _device(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the inputs as JAX's arrays."""
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def _shardings(model: keras.Model) -> tuple[list[Any], ...]:
    """Return how the state is spread over the devices."""
    if hasattr(model, "_get_state_sharding_spec"):  # it warns of what does not fit together
        return model._get_state_sharding_spec()
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    return tuple([variable.value.sharding for variable in group] for group in groups)


class _Counter:
    """The host's copy of the counter: read from the device only when it is not our own."""

    def __init__(self) -> None:
        self._array: Any = None
        self._value = 0

    def read(self, array: Any) -> int:
        """Return the counter; waits for the device only if somebody else changed the state."""
        if array is not self._array:
            self._value = int(array)
        return self._value

    def passed_on(self, array: Any) -> None:
        """Note that a step has returned this array, one more than what was read."""
        self._array, self._value = array, self._value + 1


def make_train_function(training: Any) -> Callable[[Any, Iterator[Any]], tuple[Any, Any]]:
    """Return what `fit` calls: (state, iterator) to (logs, state)."""
    model = training.model
    counter = _Counter()
    compiled = not model.run_eagerly and model.jit_compile

    def one_step(plan: Plan, state: Any, data: Any, inputs: Any) -> Any:
        with training.stepping(plan, inputs) as current:
            logs, state = model.train_step(state, data)
            return logs, state, current.report

    if compiled:
        out_shardings = None
        if keras.distribution.distribution() is not None:
            # Left to itself, the compiler might lay the weights out in another way.
            out_shardings = (None, _shardings(model), None)
        one_step = jax.jit(
            one_step, static_argnums=0, donate_argnums=1, out_shardings=out_shardings
        )
    training.compiled_step = one_step

    def train_function(state: Any, iterator: Iterator[Any]) -> tuple[Any, Any]:
        logs = None
        try:
            for _ in range(model.steps_per_execution):
                try:
                    data = next(iterator)
                except StopIteration:
                    if logs is None:
                        raise
                    break
                training.prepare(data, state)
                place = _places(training)[0]
                count = counter.read(state[2][place])
                drawn: Drawn = training.draw(count, data, compiled=compiled)
                logs, state, report = one_step(drawn.plan, state, data, _device(drawn.inputs))
                training.finish(count, drawn, report)
                counter.passed_on(state[2][place])
        except BaseException:
            # `fit` has taken the values out of the variables, and puts back what it finds here.
            model._jax_state = dict(zip(STATE, state, strict=True))
            raise
        return training.shown(logs), state

    return train_function
