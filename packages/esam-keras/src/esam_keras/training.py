"""What belongs to one compiled model: its units, its plans, and the step that it trains with."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import tree

from esam_core import ESAMRuntimeError, ESAMTypeError, ESAMValueError, NonFiniteError
from esam_core.selectors import subset_size
from esam_keras.losses import find_route
from esam_keras.optimizer import ESAM
from esam_keras.plan import Drawn, Plan, Planner
from esam_keras.report import KerasReport
from esam_keras.trial import total_of_a_few
from esam_keras.units import unit_records

__all__ = ["Current", "Training", "train_step"]

#: Where a model keeps its `Training`, so that it goes with the model.
ATTRIBUTE = "_esam_training"


@dataclass
class Current:
    """The step under way: what was drawn for it, and what it leaves.

    Args:
        plan: what the step is specialised on.
        inputs: native tensors, by name.
        report: arrays for the `StepReport`; filled by the step. None until a step has run.
    """

    plan: Plan
    inputs: dict[str, Any]
    report: dict[str, Any] | None = field(default=None)


class Training:
    """ESAM's part of a compiled model.

    Args:
        model: compiled with an ESAM.
        esam: that ESAM.
    """

    def __init__(self, model: keras.Model, esam: ESAM) -> None:
        self.model = model
        self.esam = esam
        name = keras.backend.backend()
        self.native = importlib.import_module(f"esam_keras.step_{name}")
        self.current: Current | None = None
        self.quiet = False
        self._planner: Planner | None = None
        self._variables: tuple[int, ...] = ()
        self.route: str | None = None

    @staticmethod
    def of(model: keras.Model) -> "Training":
        """Return a model's `Training`.

        Raises:
            ESAMRuntimeError: the model was not compiled with an ESAM.
        """
        found = vars(model).get(ATTRIBUTE)
        if found is None:
            raise ESAMRuntimeError(
                "The model must be compiled with an ESAM first: "
                "model.compile(optimizer=ESAM(...), loss=...). Received: a model "
                f"{'compiled with ' + repr(model.optimizer) if model.compiled else 'not compiled'}."
            )
        return found

    # -- before the first step ---------------------------------------------------------------------

    def prepare(self, data: Any, state: Any = None) -> None:
        """Build what is not built, and check what can be checked before any weight has moved.

        Args:
            data: a batch.
            state: values of all variables where they are not in the variables (JAX), or None.
        """
        model = self.model
        if self._planner is not None and self._variables == self._identity():
            return
        if state is None:  # or `fit` has built the model, and the variables' values are away
            model._symbolic_build(data_batch=data)
        self.native.refuse(model)  # again: some layers are made when a model is built
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        units = unit_records(model)
        if not units:
            raise ESAMValueError("The model must have trainable variables. Received: none.")
        fixed = self.fixed
        perturbable = [t not in fixed for t in range(len(units))]
        planner = Planner(self.esam.config, units, perturbable)
        needed = self.esam.config.select.gamma < 1.0
        self.route = find_route(model, needed, total_of_a_few(model, data, state))
        self._planner, self._variables = planner, self._identity()

    def _identity(self) -> tuple[int, ...]:
        """Return what tells whether the trainable variables are still the same."""
        return tuple(id(v) for v in self.model.trainable_variables)

    @property
    def fixed(self) -> frozenset[int]:
        """Places of variables whose gradient is a value to be stored, as in float8 training."""
        return frozenset(
            t
            for t, v in enumerate(self.model.trainable_variables)
            if getattr(v, "overwrite_with_gradient", False)
        )

    # -- a step ------------------------------------------------------------------------------------

    def draw(self, count: int, data: Any, *, compiled: bool) -> Drawn:
        """Return what the step on a batch is to do."""
        if self._planner is None:
            raise ESAMRuntimeError("`prepare` must be called before `draw`.")
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        first = next(leaf for leaf in tree.flatten(x) if leaf is not None)
        b = int(first.shape[0])
        if b == 0:
            raise ESAMValueError("The batch must not be empty. Received: a batch of 0 samples.")
        return self._planner.draw(count, b, compiled=compiled)

    @contextmanager
    def stepping(self, plan: Plan, inputs: dict[str, Any]) -> Iterator[Current]:
        """Make a step the one under way: `train_step` inside knows what was drawn for it."""
        if self.current is not None:
            raise ESAMRuntimeError("A step of this model is already under way.")
        self.current = Current(plan, inputs)
        try:
            yield self.current
        finally:
            self.current = None

    def finish(self, count: int, drawn: Drawn, report: dict[str, Any] | None) -> None:
        """Keep the report of a step; raise if it was to raise on what is not finite."""
        if report is None:
            return
        arrays = dict(report)
        ok = arrays.pop("ok", None)
        skipped = ok is not None and not bool(ok)
        if self._planner is None:
            return
        units = self._planner.units
        chosen = [unit for unit, m in zip(units, drawn.mask.perturbed, strict=True) if m]
        whole = sum(u.size for u, p in zip(units, self._planner.allowed, strict=True) if p)
        share = sum(unit.size for unit in chosen) / whole if chosen else 0.0
        losses, indices = arrays.get("losses"), arrays.get("indices")
        self.esam._report = KerasReport(
            count=count,
            perturbed=() if skipped else tuple(unit.name for unit in chosen),
            weight_share=0.0 if skipped else share * (drawn.mask.weight_beta or 1.0),
            sample_share=1.0 if indices is None or losses is None else len(indices) / len(losses),
            skipped=skipped,
            **({"losses": losses} if skipped else {"losses": None, **arrays}),
        )
        if skipped and self.esam.config.on_nonfinite == "raise":
            raise NonFiniteError(
                f"A loss or gradient of step {count} is not finite; weights and optimizer are as "
                'before the step. Use on_nonfinite="skip" to leave such steps out.'
            )

    def shown(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Return the logs without ESAM's own, where those are not wanted."""
        if not self.quiet:
            return logs
        return {key: value for key, value in logs.items() if key not in self.own_logs}

    @property
    def own_logs(self) -> tuple[str, ...]:
        """The names of the logs that ESAM adds."""
        if not self.esam.logs:
            return ()
        config = self.esam.config
        if config.select.score == "increase" and config.select.gamma < 1.0:
            return ("sharpness", "sample_share")
        return ("sample_share",)

    def log_sums(self, before: list[Any], report: dict[str, Any], b: Any) -> list[Any]:
        """Return the four sums after a step that left this report."""
        ops = keras.ops
        total, number, share, steps = before
        if "perturbed_losses" in report:
            rise = ops.mean(report["perturbed_losses"] - report["losses"])
            total, number = total + ops.cast(rise, "float32"), number + 1.0
        kept: Any = 1.0
        if "indices" in report:
            k = subset_size(self.esam.config.select.gamma, b) if isinstance(b, int) else None
            if k is None:
                k = ops.shape(report["indices"])[0]
            kept = ops.cast(k, "float32") / ops.cast(b, "float32")
        return [total, number, share + kept, steps + 1.0]

    def with_means(self, logs: dict[str, Any], sums: list[Any]) -> dict[str, Any]:
        """Return the logs with those that the sums make: not a number where no step had any."""
        total, number, share, steps = sums
        means = {"sharpness": total / number, "sample_share": share / steps}
        for name in self.own_logs:
            if name in logs:
                raise ESAMValueError(
                    f"A metric must not be called {name!r}, which is a log of ESAM's. Rename it, "
                    "or leave ESAM's logs out: ESAM(..., logs=False)."
                )
        return {**logs, **{name: means[name] for name in self.own_logs}}


def train_step(model: keras.Model, *arguments: Any) -> Any:
    """Make one ESAM step of a compiled model, with the face of Keras's own `train_step`.

    Call it from the `train_step` of a model of your own, or in a loop of your own.

    Args:
        model: compiled with an ESAM.
        *arguments: what `train_step` receives: `data` on TensorFlow and torch, `state, data` on
            JAX. `data` is a batch (x, y) or (x, y, sample_weight).

    Returns:
        What `train_step` returns: `logs` on TensorFlow and torch, `(logs, state)` on JAX.

    Raises:
        ESAMRuntimeError: the model was not compiled with an ESAM, or the call is being traced by
            a compiler that is not `fit`'s: its mask would be frozen.
        ESAMTypeError: the arguments are not those of this backend.

    Example:
        >>> import keras, numpy, esam_keras
        >>> class MyModel(keras.Sequential):
        ...     def train_step(self, *arguments):
        ...         return esam_keras.train_step(self, *arguments)
        >>> model = MyModel([keras.layers.Dense(1)])
        >>> model.compile(esam_keras.ESAM("sgd"), loss="mse")
        >>> history = model.fit(numpy.ones((8, 2)), numpy.ones((8, 1)), verbose=0)
        >>> "sharpness" in history.history
        True
    """
    training = Training.of(model)
    native = training.native
    if len(arguments) != len(native.ARGUMENTS):
        raise ESAMTypeError(
            f"`train_step` on {keras.backend.backend()} takes (model, "
            f"{', '.join(native.ARGUMENTS)}). Received: {len(arguments)} arguments after `model`."
        )
    if training.current is not None:
        return native.step(training, training.current, *arguments)
    if native.is_tracing(*arguments):
        raise ESAMRuntimeError(
            "`esam_keras.train_step` draws a mask on the host for every step; compiled by your own "
            "`tf.function` or `jax.jit` it would repeat the first one forever. Use `model.fit` or "
            "`model.train_on_batch`, which compile it themselves, or call it uncompiled."
        )
    return native.eager_step(training, *arguments)
