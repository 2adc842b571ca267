"""JAX: stateless, jitted for each plan.

With `keras.distribution.DataParallel` the devices share one theta. The compiled step is that of one
device: the gradient, its norm, epsilon and the selected samples are those of the whole batch, so
that m-sharpness has m = b. There is no separate perturbation for each device's shard.

If a sampler lists several masks, only the ascent gradient is compiled once per mask. Everything
after it is compiled once, with the mask as an input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import keras

from esam_core import ESAMRuntimeError, ESAMTypeError
from esam_keras import compat
from esam_keras.backends.base import Backend, Cut, ModelTraining, Unknown
from esam_keras.evaluation import Evaluated, State, Variables, batch_size
from esam_keras.handover import applying
from esam_keras.metrics import log_sums, logs_if, metrics_after
from esam_keras.perturbation import perturb
from esam_keras.plan import Drawn, Plan
from esam_keras.scope import PassScope
from esam_keras.step import Ascended, Outcome, Step

__all__ = ["BACKEND", "JaxBackend", "compiled_steps"]

#: The parts of the state of Keras's JAX trainer.
STATE = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)

Tensor = Any


class JaxBackend(Backend):
    """Keras on JAX; see `esam_keras.backends.base.Backend`."""

    arguments: tuple[str, ...] = ("state", "data")

    #: Keras's JAX trainer drops them.
    keeps_assigned = False

    updates_all = True

    perturb = staticmethod(perturb)

    def gradients(
        self,
        function: Callable[[list[Tensor], Cut], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[list[Tensor]], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        def uncut(variables: list[Tensor]) -> tuple[Tensor, Any]:
            return function(variables, lambda _, value: value)

        gradients, rest = jax.grad(uncut, has_aux=True)(list(variables))
        return gradients, rest

    def without_gradient(self, value: Tensor) -> Tensor:
        return jax.lax.stop_gradient(value)

    def dense(self, gradient: Tensor) -> Tensor:
        return gradient

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        words = jax.lax.bitcast_convert_type(seed, jnp.uint32)
        keys = jax.random.split(jax.random.wrap_key_data(words, impl="threefry2x32"), len(like))
        return [
            jax.random.uniform(key, theta.shape) < beta
            for key, theta in zip(keys, like, strict=True)
        ]

    def inputs_of_pass(self, x: Any) -> Any:
        return x  # tensors are not written to

    def split(self, x: Any) -> Any:
        # Otherwise the compiler computes all taken rows on every device.
        distribution = keras.distribution.distribution()
        if distribution is None:
            return x

        def constrained(leaf: Tensor) -> Tensor:
            layout = distribution.get_data_layout(leaf.shape).backend_layout
            return jax.lax.with_sharding_constraint(leaf, layout)

        return jax.tree_util.tree_map(constrained, x)

    # -- a step of a model -------------------------------------------------------------------------

    def refuse(self, model: keras.Model) -> None:
        if keras.config.is_nnx_enabled():
            raise ESAMRuntimeError(
                "ESAM does not work in Keras's NNX mode, whose variables change in place: the "
                "passes of a step need them unchanged. Disable it: KERAS_NNX_ENABLED=false."
            )

    def trained(self, model: keras.Model) -> list[Any]:
        return model.trainable_variables  # the first part of the state

    def checks_context(self, model: keras.Model) -> AbstractContextManager[Any]:
        return nullcontext()  # on abstract arrays

    def is_tracing(self, *arguments: Any) -> bool:
        return any(
            isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(arguments)
        )

    def step(
        self, training: ModelTraining, plan: Plan, inputs: dict[str, Tensor], *arguments: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        state, data = arguments
        step = _step_of(training, plan, inputs, state, data)
        outcome = step.run()
        unknown = step.evaluator.unknown
        unknown.keep_random_state()
        result, report = _after(training, outcome, state, data)
        if "ok" in report and not self.is_tracing(report) and not bool(report["ok"]):
            unknown.restore_random_state()
        return result, report

    def eager_step(self, training: ModelTraining, *arguments: Any) -> Any:
        state, data = arguments
        if len(state) != 4:
            raise ESAMTypeError(
                f"`state` must be ({', '.join(STATE)}). Received: {len(state)} parts."
            )
        training.prepare(data, state)
        count = int(state[2][_places(training)[0]])
        drawn = training.draw(count, data, compiled=False, state=state)
        drawn = replace(drawn, inputs=_to_native(drawn.inputs))
        found, report = self.step(training, drawn.plan, drawn.inputs, state, data)
        training.finish(count, drawn, report)
        return found

    def make_train_function(
        self, training: ModelTraining
    ) -> Callable[[Any, Iterator[Any]], tuple[dict[str, Any], Any]]:
        model = training.model
        counter = _Counter()
        compiled = not model.run_eagerly and model.jit_compile
        step, parts = training.step, None
        if compiled:
            step, parts = compiled_steps(training)

        def one_step(drawn: Drawn, state: Any, data: Any) -> Any:
            plan, inputs = drawn.plan, drawn.inputs
            if parts is None or not plan.active or not training.prepared.planner.masks_are_many:
                return step(plan, inputs, state, data)
            rest = drawn.with_mask_as_input()
            for_rest = (rest.plan, _to_native(rest.inputs), state, data)
            if plan.ascent.of == "earlier":  # there is no ascent gradient to compile
                return step(*for_rest)
            ascend, after = parts
            return after(*for_rest, ascend(plan, inputs, state, data))

        def train_function(state: Any, iterator: Iterator[Any]) -> tuple[dict[str, Any], Any]:
            logs = None
            try:
                for _, data in zip(range(model.steps_per_execution), iterator, strict=False):
                    training.prepare(data, state)
                    place = _places(training)[0]
                    count = counter.read(state[2][place])
                    drawn = training.draw(count, data, compiled=compiled, state=state)
                    drawn = replace(drawn, inputs=_to_native(drawn.inputs))
                    (logs, state), report = one_step(drawn, state, data)
                    training.finish(count, drawn, report)
                    counter.add(state[2][place])
            except BaseException:
                # The values are not in the variables: the compiled step was given their memory.
                compat.hold_jax_state(model, dict(zip(STATE, state, strict=True)))
                model.jax_state_sync()
                raise
            if logs is None:
                raise StopIteration
            return logs, state

        return train_function


# -- compiled functions ----------------------------------------------------------------------------


def compiled_steps(training: ModelTraining) -> tuple[Any, tuple[Any, Any] | None]:
    """Return the jitted step, and the same step in two parts if it can be split, else None.

    Returns:
        A function of (plan, inputs, state, data). The two parts are a function of the same
        arguments that returns an `Ascended`, and a function of these and the `Ascended`, whose plan
        has no mask.
    """
    out_shardings = None
    distributed = keras.distribution.distribution() is not None
    if distributed:
        # Otherwise the compiler might choose another layout for the weights.
        model = training.model
        groups = (*Variables.of(model)[:2], model.optimizer.variables, model.metrics_variables)
        out_shardings = ((None, compat.jax_shardings(model, groups)), None)

    def whole(plan: Plan, inputs: Any, state: Any, data: Any) -> Any:
        return training.step(plan, inputs, state, data)

    def ascend(plan: Plan, inputs: Any, state: Any, data: Any) -> Ascended:
        step = _step_of(training, plan, inputs, state, data)
        ascended = step.ascend(all_gradients=True)
        step.evaluator.unknown.keep_random_state()
        return _drop_shared(state, ascended)

    def after(plan: Plan, inputs: Any, state: Any, data: Any, ascended: Ascended) -> Any:
        step = _step_of(training, plan, inputs, state, data)
        climb = step.climb(_restore_shared(state, ascended))
        outcome = step.descend(climb)
        step.evaluator.unknown.keep_random_state()
        return _after(training, outcome, state, data)

    step = jax.jit(whole, static_argnums=0, donate_argnums=2, out_shardings=out_shardings)
    if distributed or training.has_own_train_step:
        return step, None
    parts = (jax.jit(ascend, static_argnums=0), jax.jit(after, static_argnums=0, donate_argnums=2))
    return step, parts


def _drop_shared(state: Any, ascended: Ascended) -> Ascended:
    """Return results that share no buffer with the state, which the next function also gets.

    Values equal to those in the state are left out; other shared values are copied.
    """
    entry = State(state[0], state[1], state[3])
    at_theta = cast(Evaluated, ascended.at_theta)  # the ascent pass
    changed = [
        [None if new is old else new for new, old in zip(*groups, strict=True)]
        for groups in zip(at_theta.state, entry, strict=True)
    ]
    y_pred = jax.tree_util.tree_map(jnp.copy, at_theta.y_pred)
    return ascended._replace(at_theta=at_theta._replace(y_pred=y_pred, state=State(*changed)))


def _restore_shared(state: Any, ascended: Ascended) -> Ascended:
    """Return the results that `_drop_shared` split."""
    entry = State(state[0], state[1], state[3])
    at_theta = cast(Evaluated, ascended.at_theta)
    whole = [
        [old if new is None else new for new, old in zip(*groups, strict=True)]
        for groups in zip(at_theta.state, entry, strict=True)
    ]
    return ascended._replace(at_theta=at_theta._replace(state=State(*whole)))


# -- the parts of a step ---------------------------------------------------------------------------


def _step_of(training: ModelTraining, plan: Plan, inputs: Any, state: Any, data: Any) -> Step:
    """Return the step on a batch, from a state."""
    trainable, non_trainable, optimizer_variables, metrics = state
    values = zip(training.model.optimizer.variables, optimizer_variables, strict=True)
    batch = keras.utils.unpack_x_y_sample_weight(data)
    entry = State(trainable, non_trainable, metrics)
    unknown = Unknown(training.model, training.noise)
    with PassScope({id(v): value for v, value in values}):
        variables = Variables.of(training.model)
        return Step.of(training, BACKEND, plan, inputs, batch, variables, entry, unknown)


def _after(
    training: ModelTraining, outcome: Outcome, state: Any, data: Any
) -> tuple[tuple[dict[str, Any], Any], dict[str, Tensor]]:
    """Run the update and the metrics after the passes; return ((logs, state), report)."""
    model, esam = training.model, training.esam
    trainable, _, optimizer_variables, metrics = state
    batch = keras.utils.unpack_x_y_sample_weight(data)
    gradients = [
        jnp.zeros_like(v) if g is None else g
        for g, v in zip(outcome.gradients, trainable, strict=True)
    ]
    moved, updated = trainable, optimizer_variables
    if trainable:
        with applying():
            moved, updated = model.optimizer.stateless_apply(
                optimizer_variables, gradients, list(trainable)
            )
    places = _places(training)
    own = [optimizer_variables[place] for place in places]
    sums = log_sums(own[1:], outcome.report, batch_size(batch[0]))
    updated = list(updated)
    for place, value, before in zip(places, [own[0] + 1, *sums], own, strict=True):
        updated[place] = jnp.asarray(value, dtype=before.dtype)
    variables = Variables.of(model)
    # Keras's JAX trainer drops what `compute_metrics` assigns to other variables.
    logs, measured = metrics_after(model, variables, outcome, batch, BACKEND.without_gradient)
    counted = [value for _, value in measured[: len(variables.metrics)]]
    after = (moved, outcome.left.state.non_trainable, updated, counted)
    report = outcome.report
    if esam.config.on_nonfinite != "propagate":
        finite = [jnp.all(jnp.isfinite(g)) for g in gradients]
        ok = jnp.all(jnp.stack([outcome.finite, *finite]))
        after = _if_finite(training, ok, after, state)
        logs = logs_if(model, variables.metrics, ok, logs, metrics)
        report = {**report, "ok": ok}
    sums = [after[2][place] for place in places[1:]]
    return (training.with_means(logs, sums), after), report


def _if_finite(training: ModelTraining, finite: Tensor, after: Any, before: Any) -> Any:
    """Return the state after the step if it was finite, else the previous state.

    A skipped step counts; one that raises does not.
    """
    after = tuple(list(group) for group in after)
    before = tuple(list(group) for group in before)
    chosen = jax.tree_util.tree_map(lambda a, b: jnp.where(finite, a, b), after, before)
    if training.esam.config.on_nonfinite == "skip":
        place = _places(training)[0]
        chosen[2][place] = after[2][place]
    return chosen


def _places(training: ModelTraining) -> list[int]:
    """Return the indices of the counter and the log sums in the optimizer's variables."""
    at = {id(v): i for i, v in enumerate(training.model.optimizer.variables)}
    return [at[id(v)] for v in (training.esam.count, *training.esam.log_variables)]


def _to_native(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return inputs as JAX arrays; the transfer is explicit, which `jax.transfer_guard` allows."""
    return {name: jax.device_put(value) for name, value in inputs.items()}


class _Counter:
    """The host's copy of the counter; reads the device only if the state was set elsewhere."""

    def __init__(self) -> None:
        self._array: Any = None
        self._value = 0

    def read(self, array: Any) -> int:
        """Return the counter; waits for the device only if the state was changed elsewhere."""
        if array is not self._array:
            self._value = int(array)
        return self._value

    def add(self, array: Any) -> None:
        """Record that a step has returned this array, whose value is the last read one plus 1."""
        self._array, self._value = array, self._value + 1


#: The only instance.
BACKEND = JaxBackend()
