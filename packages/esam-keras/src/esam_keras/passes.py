"""The passes of one step as a pure function of the model's state, the same on every backend.

Nothing here assigns to a variable. What the ascent pass made of the state is returned, to be kept
by the caller once nothing can fail any more.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import keras
from keras import ops

from esam_core import ESAMConfig
from esam_keras.backends.base import Backend, Cut
from esam_keras.evaluation import Evaluated, Evaluator, State, batch_size
from esam_keras.perturbation import widened
from esam_keras.plan import Plan
from esam_keras.selection import Selected, select

__all__ = ["Climb", "Outcome", "Step", "loss_scale"]

Tensor = Any


class Climb(NamedTuple):
    """What phases 2 and 3 leave.

    Args:
        at_theta: the ascent pass: its state is the one to keep.
        climbed: T tensors theta + epsilon.
        losses: (b,) losses at theta, or None where the loss has no value a sample.
        gradient_norm: ||g||.
        perturbation_norm: ||epsilon||.
        finite: whether everything seen was finite.
    """

    at_theta: Evaluated
    climbed: list[Tensor]
    losses: Tensor | None
    gradient_norm: Tensor
    perturbation_norm: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Outcome:
    """What the passes of a step return.

    Args:
        gradients: T descent gradients, scaled as the optimizer scales its loss; None where the
            loss does not depend on a variable.
        at_theta: the ascent pass: its state is the one to keep.
        finite: whether everything seen was finite.
        report: arrays for the `StepReport`, by field name.
    """

    gradients: list[Tensor | None]
    at_theta: Evaluated
    finite: Tensor
    report: dict[str, Tensor] = field(default_factory=dict)


def loss_scale(optimizer: Any) -> Tensor | None:
    """Return what an optimizer multiplies losses by, or None for 1."""
    scale = optimizer.scale_loss(1.0)
    return None if isinstance(scale, float) and scale == 1.0 else scale


@dataclass(frozen=True)
class Step:
    """The passes of one step.

    Args:
        evaluator: of the model and its loss on the batch.
        config: the hyperparameters.
        plan: what the step is specialised on.
        inputs: what changes from step to step.
        state: at entry.
        loss_scale: what the optimizer multiplies losses by, or None for 1.
        fixed: places of variables that no mask may hit.
    """

    evaluator: Evaluator
    config: ESAMConfig
    plan: Plan
    inputs: dict[str, Tensor]
    state: State
    loss_scale: Tensor | None = None
    fixed: frozenset[int] = frozenset()

    def run(self) -> Outcome:
        """Return the gradients for the update and all that the pass at theta left."""
        return self.descend(self.climb()) if self.plan.active else self.base_step()

    def base_step(self) -> Outcome:
        """Return what a step without a perturbation leaves: forward and backward, and no more."""
        everything = list(range(len(self.state.trainable)))
        gradients, at_theta, losses = self._pass_at_theta(everything)
        report = {} if losses is None else {"losses": losses}
        return Outcome(gradients, at_theta, ops.isfinite(at_theta.loss), report)

    def climb(self) -> Climb:
        """Phases 2 and 3: the pass at theta, its gradient for the masked units, and epsilon."""
        count = len(self.state.trainable)
        chosen = [t for t in range(count) if t not in self.fixed and self._needs_gradient(t)]
        found, at_theta, losses = self._pass_at_theta(chosen)
        theta = at_theta.state.trainable
        gradients: list[Tensor | None] = [None] * count
        for t, g in zip(chosen, found, strict=True):
            gradients[t] = self._unscaled(theta[t], g)
        masks = None
        if self.plan.weight_beta is not None:
            seed = self.inputs["weight_seed"]
            masks = self._backend.weight_masks(seed, theta, self.plan.weight_beta)
        scale = self.inputs["scale"] if self.plan.scale is None else self.plan.scale
        rho = self.config.rho * self.plan.rho_factor
        perturbed = self._backend.perturb(gradients, theta, scale, rho, self.config, masks)
        finite = perturbed.finite
        if losses is not None:
            finite = ops.logical_and(finite, ops.all(ops.isfinite(losses)))
        return Climb(
            at_theta,
            perturbed.climbed,
            losses,
            perturbed.gradient_norm,
            perturbed.perturbation_norm,
            finite,
        )

    def descend(self, climb: Climb) -> Outcome:
        """Phases 4 and 5: the samples to keep, and their gradient at theta + epsilon."""
        b = batch_size(self.evaluator.batch[0])
        report = {
            "perturbation_norm": climb.perturbation_norm,
            "gradient_norm": climb.gradient_norm,
        }
        finite, selected = climb.finite, None
        if climb.losses is not None:
            report["losses"] = climb.losses
        if self._selects(b):
            perturbed = None
            if self.config.select.score == "increase":
                perturbed = self._selection(climb.climbed, b)
                report["perturbed_losses"] = perturbed
                finite = ops.logical_and(finite, ops.all(ops.isfinite(perturbed)))
            selected = select(self.config.select, climb.losses, perturbed, self.inputs, b)
        # What is not finite must be seen in the gradient, even if the samples that were selected
        # are harmless.
        poison = ops.where(finite, 1.0, float("nan"))
        gradients = self._descent(climb, b, selected, poison)
        if selected is not None:
            report["indices"] = selected.indices
            report["sample_weights"] = selected.weights * ops.cast(poison, selected.weights.dtype)
        return Outcome(gradients, climb.at_theta, finite, report)

    # -- passes ------------------------------------------------------------------------------------

    def _pass_at_theta(
        self, chosen: Sequence[int]
    ) -> tuple[list[Tensor | None], Evaluated, Tensor | None]:
        """Return the scaled gradients by the chosen variables, the evaluation, and the losses."""
        b = batch_size(self.evaluator.batch[0])
        routed = self.evaluator.route is not None

        def state(arguments: list[Tensor]) -> State:
            trainable = list(self.state.trainable)
            for t, value in zip(chosen, arguments, strict=False):  # the factor comes last
                trainable[t] = value
            return self.state._replace(trainable=trainable)

        def scaled_loss(arguments: list[Tensor], cut: Cut) -> tuple[Tensor, Evaluated]:
            evaluated = self.evaluator.evaluate(
                state(arguments), arguments[-1] if routed else None, cut=self._cut(cut, chosen)
            )
            return self._scaled(evaluated.loss), evaluated

        arguments = [self.state.trainable[t] for t in chosen]
        if routed:
            arguments.append(_ones(b))
        found, evaluated = self._backend.gradients(
            scaled_loss, arguments, again=lambda values: self._again(state(values))
        )
        if not self._backend.keeps_assigned:
            kept = evaluated.state._replace(trainable=self.state.trainable)
            evaluated = evaluated._replace(state=kept)
        losses = self._per_sample(found.pop(), b) if routed else None
        return found, evaluated, losses

    def _selection(self, climbed: list[Tensor], b: int | Tensor) -> Tensor:
        """Phase 4: the losses at theta + epsilon; only they are differentiated, by the factors."""
        state = self.state._replace(trainable=climbed)

        def loss(arguments: list[Tensor], _: Cut) -> tuple[Tensor, None]:
            return self.evaluator.evaluate(state, arguments[0]).loss, None

        (derivative,), _ = self._backend.gradients(
            loss, [_ones(b)], again=lambda _: self._again(state)
        )
        return cast(Tensor, derivative) * ops.cast(b, cast(Tensor, derivative).dtype)

    def _descent(
        self, climb: Climb, b: int | Tensor, selected: Selected | None, poison: Tensor
    ) -> list[Tensor | None]:
        """Phase 5: the gradient of the sum of w_i l_i(theta + epsilon) for every variable.

        The predictions of the selected samples take their places among the ascent's, and the loss
        is that of the whole batch with the factors b w_i, and 0 for the rejected: so l_i is one
        and the same function in every pass, whatever the loss divides by.
        """
        evaluator, running = self.evaluator, self.plan.kept == "one"
        rest = self.state
        if running:
            entry = self.state.non_trainable
            statistics = evaluator.with_statistics_of(climb.at_theta.state, entry)
            rest = self.state._replace(non_trainable=statistics)

        def scaled_loss(trainable: list[Tensor], cut: Cut) -> tuple[Tensor, None]:
            state = rest._replace(trainable=trainable)
            if selected is None:
                loss = evaluator.evaluate(state, None, cut=cut, running=running).loss
            else:
                loss = evaluator.evaluate_selected(
                    state, b, climb.at_theta, selected, cut=cut, running=running
                )
            return self._scaled(loss * ops.cast(poison, loss.dtype)), None

        gradients, _ = self._backend.gradients(
            scaled_loss,
            climb.climbed,
            again=lambda trainable: self._again(rest._replace(trainable=trainable)),
        )
        return gradients

    # -- small things ------------------------------------------------------------------------------

    @property
    def _backend(self) -> Backend:
        """The native parts."""
        return self.evaluator.backend

    def _again(self, state: State) -> AbstractContextManager[Any]:
        """Return a scope in which what is checkpointed finds the values of its forward."""
        return self.evaluator.scope(state)

    def _cut(self, cut: Cut, chosen: Sequence[int]) -> Cut:
        """Return a cut that knows the chosen variables by their places in the model."""
        at = {t: place for place, t in enumerate(chosen)}

        def of_chosen(t: int, value: Tensor) -> Tensor:
            return cut(at[t], value) if t in at else self._backend.without_gradient(value)

        return of_chosen

    def _needs_gradient(self, t: int) -> bool:
        """Return whether the ascent needs a variable's gradient."""
        scale = self.plan.scale
        return self.config.norm == "full" or scale is None or scale[t] > 0.0

    def _selects(self, b: int | Tensor) -> bool:
        """Return whether this step leaves samples out."""
        alone = isinstance(b, int) and b == 1
        return self.plan.kept == "some" or (self.plan.kept == "one" and not alone)

    def _per_sample(self, derivative: Tensor, b: int | Tensor) -> Tensor:
        """Return l_i from the derivative of the scaled loss by the factors."""
        if self.loss_scale is not None:
            derivative = derivative / ops.cast(self.loss_scale, derivative.dtype)
        return cast(Tensor, derivative) * ops.cast(b, cast(Tensor, derivative).dtype)

    def _scaled(self, loss: Tensor) -> Tensor:
        """Return the loss as the optimizer scales it."""
        return loss if self.loss_scale is None else loss * ops.cast(self.loss_scale, loss.dtype)

    def _unscaled(self, theta: Tensor, gradient: Tensor | None) -> Tensor:
        """Return an ascent gradient without the scale, dense, 0 where there is none."""
        if gradient is None:
            return ops.zeros_like(theta)
        gradient = self._backend.dense(gradient)
        if self.loss_scale is None:
            return gradient
        gradient = widened(gradient)
        return gradient / ops.cast(self.loss_scale, gradient.dtype)


def _ones(b: int | Tensor) -> Tensor:
    """Return the factors f_i = 1."""
    return ops.ones((b,), dtype=keras.config.floatx())
