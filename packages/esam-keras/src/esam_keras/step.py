"""One step, phase by phase: from the state at entry to the gradients for the update.

The phases are those of the table in the documentation; their passes are in `esam_keras.passes`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import keras
from keras import ops

from esam_keras.backends.base import Backend, ModelTraining, Unknown
from esam_keras.evaluation import Evaluated, Evaluator, State, Variables, batch_size
from esam_keras.losses import Batch
from esam_keras.passes import Passes, loss_scale
from esam_keras.plan import Plan
from esam_keras.selection import Selected, select

__all__ = ["Ascended", "Climb", "Outcome", "Seen", "Step"]

Tensor = Any


class Ascended(NamedTuple):
    """The results of phase 2.

    Args:
        gradients: T ascent gradients; None for a variable that is not perturbed.
        at_theta: the pass at theta, or None if there is none.
        losses: at theta: (b,), or (n,) of the part; None if there are none.
    """

    gradients: list[Tensor | None]
    at_theta: Evaluated | None
    losses: Tensor | None


class Climb(NamedTuple):
    """The results of phases 2 and 3.

    Args:
        at_theta: as in `Ascended`.
        climbed: T tensors theta + epsilon.
        losses: as in `Ascended`.
        gradient_norm: ||g||.
        perturbation_norm: ||epsilon||.
        finite: whether all values were finite.
    """

    at_theta: Evaluated | None
    climbed: list[Tensor]
    losses: Tensor | None
    gradient_norm: Tensor
    perturbation_norm: Tensor
    finite: Tensor


class Seen(NamedTuple):
    """The samples that the step sees first, whose loss and metrics are logged.

    Args:
        loss: their loss.
        evaluated: with predictions for the whole batch, repeated for other samples.
        indices: (n,), the places of the samples; None for the whole batch.
    """

    loss: Tensor
    evaluated: Evaluated
    indices: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """The results of a step's passes.

    Args:
        gradients: T descent gradients, scaled as the optimizer scales its loss; None for a variable
            that the loss does not depend on.
        left: the pass whose state is kept.
        seen: the samples whose loss and metrics are logged.
        finite: whether all values were finite.
        report: arrays for the `StepReport`, by field name.
    """

    gradients: list[Tensor | None]
    left: Evaluated
    seen: Seen
    finite: Tensor
    report: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step(Passes):
    """One step: see `Passes` for its arguments."""

    @classmethod
    def of(
        cls,
        training: ModelTraining,
        backend: Backend,
        plan: Plan,
        inputs: dict[str, Tensor],
        batch: Batch,
        variables: Variables,
        state: State,
        unknown: Unknown,
    ) -> "Step":
        """Return the step of a model that is prepared.

        The optimizer's variables have their values at the start of the step: on JAX in a
        `PassScope`.
        """
        model, esam, prepared = training.model, training.esam, training.prepared
        with_rows = prepared.outputs_with_rows
        return cls(
            Evaluator(backend, unknown, model, prepared.route, variables, batch, with_rows),
            esam.config,
            plan,
            inputs,
            state,
            loss_scale(model.optimizer),
            prepared.fixed,
            esam.direction(variables.trainable) if plan.ascent.of == "earlier" else (),
        )

    def run(self) -> Outcome:
        """Return the gradients for the update, the state to keep, and the report."""
        if not self.plan.active:
            return self.base_step()
        return self.descend(self.climb(self.ascend()))

    def base_step(self) -> Outcome:
        """Return the outcome of a step without a perturbation: one forward and backward."""
        gradients, left, losses = self.at_theta(list(range(len(self.state.trainable))))
        report = {} if losses is None else {"losses": losses}
        return Outcome(gradients, left, Seen(left.loss, left), ops.isfinite(left.loss), report)

    def ascend(self, *, all_gradients: bool = False) -> Ascended:
        """Phase 2: the ascent direction of the masked units.

        Args:
            all_gradients: return zeros for units outside the mask, instead of None, so that the
                result has the same form for every mask.
        """
        count = len(self.state.trainable)
        perturbable = [t for t in range(count) if t not in self.fixed]
        chosen = [t for t in perturbable if self._needs_gradient(t)]
        gradients: list[Tensor | None] = [None] * count
        at_theta, losses, theta = None, None, self.state.trainable
        if all_gradients:
            for t in perturbable:
                gradients[t] = self._unscale(theta[t], ops.zeros_like(theta[t]))
        if self.plan.ascent.of == "earlier":
            if self.plan.ascent.scores:
                _, at_theta, losses = self.at_theta([])
                theta = at_theta.state.trainable
            for t in chosen:
                kept = self.earlier[t]
                gradients[t] = ops.zeros_like(theta[t]) if kept is None else kept
        else:
            found, at_theta, losses = self.at_theta(chosen)
            theta = at_theta.state.trainable
            for t, g in zip(chosen, found, strict=True):
                gradients[t] = self._unscale(theta[t], g)
        return Ascended(gradients, at_theta, losses)

    def climb(self, ascended: Ascended) -> Climb:
        """Phase 3: theta + epsilon."""
        gradients, at_theta, losses = ascended
        theta = self.state.trainable if at_theta is None else at_theta.state.trainable
        masks = None
        if self.plan.weight_beta is not None:
            seed = self.inputs["weight_seed"]
            masks = self._backend.weight_masks(seed, theta, self.plan.weight_beta)
        scale = self.inputs["scale"] if self.plan.scale is None else self.plan.scale
        rho = self.config.rho * self.plan.rho_factor
        perturbed = self._backend.perturb(gradients, theta, scale, rho, self.config, masks)
        climbed, finite = perturbed.climbed, perturbed.finite
        if not self.plan.ascent.records:  # the descent pass updates the moving statistics
            climbed = [
                old if new is old else ops.where(finite, new, old)
                for new, old in zip(climbed, theta, strict=True)
            ]
        if losses is not None:
            finite = ops.logical_and(finite, ops.all(ops.isfinite(losses)))
        return Climb(
            at_theta,
            climbed,
            losses,
            perturbed.gradient_norm,
            perturbed.perturbation_norm,
            finite,
        )

    def descend(self, climb: Climb) -> Outcome:
        """Phases 4 and 5: the selected samples, and their gradient at theta + epsilon."""
        b = batch_size(self.evaluator.batch[0])
        report = {
            "perturbation_norm": climb.perturbation_norm,
            "gradient_norm": climb.gradient_norm,
        }
        finite, selected = climb.finite, None
        if climb.losses is not None:
            report["losses"] = climb.losses
        if self.plan.kept != "all":
            perturbed = None
            if self.config.select.score == "increase":
                perturbed = self.perturbed_losses(climb.climbed, b)
                report["perturbed_losses"] = perturbed
                finite = ops.logical_and(finite, ops.all(ops.isfinite(perturbed)))
            selected = select(self.config.select, climb.losses, perturbed, self.inputs, b)
        # Non-finite values must reach the gradient, even if all selected samples are finite.
        # As the root of -1, because a NaN among the constants would alarm those who debug NaNs.
        poison = ops.sqrt(2.0 * ops.cast(finite, keras.config.floatx()) - 1.0)
        descent = self.descent(climb.climbed, climb.at_theta, selected, poison)
        if descent.losses is not None:
            report["perturbed_losses"] = descent.losses
        if selected is not None:
            report["indices"] = selected.indices
            report["sample_weights"] = selected.weights * ops.cast(poison, selected.weights.dtype)
        # Either the pass at theta or the descent pass keeps its state.
        left = cast(Evaluated, climb.at_theta if descent.evaluated is None else descent.evaluated)
        return Outcome(
            descent.gradients,
            left,
            self._find_seen(climb, descent.evaluated, selected),
            finite,
            report,
        )

    def _find_seen(
        self, climb: Climb, descent: Evaluated | None, selected: Selected | None
    ) -> Seen:
        """Return the samples that the step sees first: at theta if there is such a pass."""
        at_theta, part = climb.at_theta, self.inputs.get("part")
        if at_theta is None:
            descent = cast(Evaluated, descent)
            return Seen(descent.logged, descent, None if selected is None else selected.indices)
        if self.plan.ascent.of != "part":
            return Seen(at_theta.loss, at_theta)
        if not self.plan.ascent.scores:
            return Seen(at_theta.logged, at_theta, part)
        # The loss is that of the part, and linear in the factors of the samples.
        losses = ops.cast(climb.losses, at_theta.loss.dtype)
        others = ops.mean(losses) - ops.mean(ops.take(losses, part, axis=0))
        return Seen(at_theta.loss + others, at_theta)

    def _needs_gradient(self, t: int) -> bool:
        """Return whether the ascent pass needs a variable's gradient."""
        scale = self.plan.scale
        return self.config.norm == "full" or scale is None or scale[t] > 0.0
