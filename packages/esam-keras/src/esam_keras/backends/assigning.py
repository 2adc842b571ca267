"""The step on backends that assign to variables: TensorFlow and torch.

The passes are a pure function of the state (see `esam_keras.passes`). Their results are assigned to
the variables after the last one, when only the metrics can still fail.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from esam_keras.backends.base import Backend, ModelTraining, Unknown
from esam_keras.evaluation import State, Variables, batch_size
from esam_keras.handover import StepVariables
from esam_keras.metrics import log_sums, logs_if, metrics_after
from esam_keras.plan import Plan
from esam_keras.step import Outcome, Step

__all__ = ["AssigningBackend"]

Tensor = Any


class AssigningBackend(Backend):
    """The common part of TensorFlow and torch; see `esam_keras.backends.base.Backend`."""

    arguments: tuple[str, ...] = ("data",)

    keeps_assigned = True

    def step(
        self, training: ModelTraining, plan: Plan, inputs: dict[str, Tensor], *arguments: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run a step and return its logs and its report's arrays."""
        model, esam = training.model, training.esam
        batch = keras.utils.unpack_x_y_sample_weight(self.on_device(arguments[0]))
        variables = Variables.split(model, self.trained(model))
        entry = State(*([self.value(v) for v in group] for group in variables))
        with self.whole_step(training, variables) as unknown:
            step = Step.of(training, self, plan, inputs, batch, variables, entry, unknown)
            outcome = step.run()
            training.has_run = True
            unknown.keep_random_state()
            hooked = self.run_hooks(outcome.gradients, variables.trainable)
            outcome = replace(outcome, gradients=hooked)
            left = outcome.left
            before = [self.value(v) for v in esam.log_variables]
            sums = log_sums(before, outcome.report, batch_size(batch[0]))
            assigned = [
                *zip(variables.trainable, entry.trainable, left.state.trainable, strict=True),
                *zip(
                    variables.non_trainable,
                    entry.non_trainable,
                    left.state.non_trainable,
                    strict=True,
                ),
                *((variable, None, new) for variable, new in left.strangers),
                *zip(esam.log_variables, before, sums, strict=True),
            ]

            def update() -> None:
                unknown.keep_buffers()
                for variable, old, new in assigned:
                    if new is not old:
                        variable.assign(new)
                if variables.trainable:
                    trained = StepVariables(variables.trainable)
                    self.apply(model.optimizer, outcome.gradients, trained)
                if not self.is_tracing():  # else the metrics have been traced before any update
                    training.updated = True

            ok = None if esam.config.on_nonfinite == "propagate" else self._is_finite(outcome)
            self._run_if(ok, update)
            if ok is not None and not self.is_tracing() and not bool(ok):
                unknown.restore_random_state()
        # As in Keras, the metrics see the model and the optimizer after the update.
        logs, measured = metrics_after(model, variables, outcome, batch, self.without_gradient)

        def keep_metrics() -> None:
            for variable, new in measured:
                variable.assign(new)

        report = outcome.report
        if ok is not None:
            logs = logs_if(model, variables.metrics, ok, logs, entry.metrics)
            sums = [ops.where(ok, new, old) for new, old in zip(sums, before, strict=True)]
            report = {**report, "ok": ok}
        self._run_if(ok, keep_metrics)
        return training.with_means(logs, sums), report

    def on_device(self, data: Any) -> Any:
        """Return a batch on the device of the model, so that no pass has to copy it."""
        return data

    def run_hooks(
        self, gradients: list[Tensor | None], variables: Sequence[Any]
    ) -> list[Tensor | None]:
        """Return descent gradients after the user's hooks on the variables, if there are any."""
        return gradients

    def eager_step(self, training: ModelTraining, *arguments: Any) -> Any:
        """Draw a step, run it uncompiled, count it, and return its logs."""
        return self.run_counted(training, arguments[0], functools.partial(self.step, training))

    def run_counted(
        self,
        training: ModelTraining,
        data: Any,
        step: Callable[[Plan, dict[str, Tensor], Any], tuple[dict[str, Any], Any]],
        *,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """Draw a step, run it, count it, and return its logs.

        Args:
            training: ESAM's part of the model.
            data: the batch.
            step: takes the plan, its inputs and the batch; returns logs, and a report's arrays.
            compiled: whether `step` is compiled for each plan.
        """
        training.prepare(data)
        count = int(training.esam.count.numpy())
        drawn = training.draw(count, data, compiled=compiled)
        inputs = {name: ops.convert_to_tensor(value) for name, value in drawn.inputs.items()}
        drawn = replace(drawn, inputs=inputs)
        with training.counting(count):
            logs, report = step(drawn.plan, drawn.inputs, data)
            training.finish(count, drawn, report)
        return logs

    def _is_finite(self, outcome: Outcome) -> Tensor:
        """Return whether the passes and all gradients are finite."""
        found = [self.dense(g) for g in outcome.gradients if g is not None]
        finite = [ops.all(ops.isfinite(g)) for g in found]
        return ops.all(ops.stack([outcome.finite, *finite]))

    def _run_if(self, ok: Tensor | None, assign: Callable[[], None]) -> None:
        """Run assignments if `ok`; None for always."""
        if ok is None:
            assign()
        else:
            self.keep_if(ok, assign)

    # -- implemented by TensorFlow and torch ------------------------------------------

    @abstractmethod
    def value(self, variable: Any) -> Tensor:
        """Return a variable's value, which is valid until the next assignment."""

    @abstractmethod
    def whole_step(
        self, training: ModelTraining, variables: Variables
    ) -> AbstractContextManager[Unknown]:
        """Return the context of a step; its value handles state that Keras does not know."""

    @abstractmethod
    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: StepVariables) -> None:
        """Run the update."""

    @abstractmethod
    def keep_if(self, ok: Tensor, commit: Callable[[], None]) -> None:
        """Commit if `ok`."""
