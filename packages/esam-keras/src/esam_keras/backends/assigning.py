"""The step on backends that assign to variables: TensorFlow and torch.

The passes are a pure function of the state (see `esam_keras.passes`). Their results are assigned to
the variables at the end, when nothing of ours can fail any more.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
from keras import ops

from esam_keras.backends.base import Backend, ModelTraining, Unknown
from esam_keras.evaluation import Evaluator, State, Variables, batch_size
from esam_keras.handover import StepVariables
from esam_keras.metrics import log_sums, logs_if, metrics_after
from esam_keras.passes import loss_scale
from esam_keras.plan import Plan
from esam_keras.step import Step

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
        variables = Variables.of(training.model)
        with self.whole_step(training.model, variables) as unknown:
            return self._step(training, plan, inputs, arguments[0], variables, unknown)

    def _step(
        self,
        training: ModelTraining,
        plan: Plan,
        inputs: dict[str, Tensor],
        data: Any,
        variables: Variables,
        unknown: Unknown,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run a step inside `whole_step`."""
        model, esam, prepared = training.model, training.esam, training.prepared
        batch = keras.utils.unpack_x_y_sample_weight(data)
        entry = State(*([self.value(v) for v in group] for group in variables))
        earlier = esam.direction(variables.trainable) if plan.ascent.of == "earlier" else ()
        with_rows = prepared.outputs_with_rows
        outcome = Step(
            Evaluator(self, unknown, model, prepared.route, variables, batch, with_rows),
            esam.config,
            plan,
            inputs,
            entry,
            loss_scale(model.optimizer),
            prepared.fixed,
            earlier,
        ).run()
        unknown.keep_random_state()
        logs, after = metrics_after(model, variables, outcome, batch, keeps_assigned=True)
        left = after.state
        before = [self.value(v) for v in esam.log_variables]
        gamma = esam.config.select.gamma
        sums = log_sums(before, outcome.report, gamma, batch_size(batch[0]))
        assigned = [
            *zip(variables.trainable, entry.trainable, left.trainable, strict=True),
            *zip(variables.non_trainable, entry.non_trainable, left.non_trainable, strict=True),
            *zip(variables.metrics, entry.metrics, left.metrics, strict=True),
            *zip(esam.log_variables, before, sums, strict=True),
        ]

        def commit() -> None:
            unknown.keep_buffers()
            for variable, new in after.strangers:
                variable.assign(new)
            for variable, old, new in assigned:
                if new is not old:
                    variable.assign(new)
            if variables.trainable:
                self.apply(model.optimizer, outcome.gradients, StepVariables(variables.trainable))

        report = outcome.report
        if esam.config.on_nonfinite == "propagate":
            commit()
        else:
            found = [self.dense(g) for g in outcome.gradients if g is not None]
            finite = [ops.all(ops.isfinite(g)) for g in found]
            ok = ops.all(ops.stack([outcome.finite, *finite]))
            self.keep_if(ok, commit)
            logs = logs_if(model, variables.metrics, ok, logs, entry.metrics)
            sums = [ops.where(ok, new, old) for new, old in zip(sums, before, strict=True)]
            report = {**report, "ok": ok}
        return training.with_means(logs, sums), report

    # -- implemented by TensorFlow and torch ------------------------------------------

    @abstractmethod
    def value(self, variable: Any) -> Tensor:
        """Return a variable's value, which is valid until the next assignment."""

    @abstractmethod
    def whole_step(
        self, model: keras.Model, variables: Variables
    ) -> AbstractContextManager[Unknown]:
        """Return the context of a step; its value handles state that Keras does not know."""

    @abstractmethod
    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: StepVariables) -> None:
        """Run the update."""

    @abstractmethod
    def keep_if(self, ok: Tensor, commit: Callable[[], None]) -> None:
        """Commit if `ok`."""
