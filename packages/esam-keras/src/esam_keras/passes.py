"""The passes of one step as pure functions of the model's state, the same on every backend.

Nothing here assigns to a variable. The passes return the new state, which the caller keeps when
nothing can fail any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops

from esam_core import ESAMConfig, ESAMRuntimeError
from esam_keras.backends.base import Backend, Cut
from esam_keras.evaluation import Evaluated, Evaluator, State, batch_size
from esam_keras.perturbation import wide_floatx, widen
from esam_keras.plan import Plan
from esam_keras.rows import Fill, fill_from_batch, fill_from_rest, spread
from esam_keras.selection import Selected

__all__ = ["AtTheta", "Descent", "Passes", "loss_scale"]

Tensor = Any


class AtTheta(NamedTuple):
    """The results of a pass at theta.

    Args:
        gradients: of the chosen variables, scaled as the optimizer scales its loss; None for a
            variable that the loss does not depend on.
        evaluated: the new state, and the predictions: for the whole batch if all samples were run,
            else for the part, repeated.
        losses: of the samples that were run; None if there are no losses per sample.
    """

    gradients: list[Tensor | None]
    evaluated: Evaluated
    losses: Tensor | None


class Descent(NamedTuple):
    """The results of the descent pass.

    Args:
        gradients: T gradients, scaled as the optimizer scales its loss; None for a variable that
            the loss does not depend on.
        evaluated: the results of the forward if it records, else None.
        losses: of the samples that were run if there was no pass at theta, else None.
    """

    gradients: list[Tensor | None]
    evaluated: Evaluated | None
    losses: Tensor | None


def loss_scale(optimizer: Any) -> Tensor | None:
    """Return the factor by which an optimizer multiplies losses, or None for 1."""
    scale = optimizer.scale_loss(1.0)
    return None if isinstance(scale, float) and scale == 1.0 else scale


@dataclass(frozen=True)
class Passes:
    """The passes of one step, each a method.

    Args:
        evaluator: evaluates the model and its loss on the batch.
        config: the hyperparameters.
        plan: the static part of the step.
        inputs: the inputs that change from step to step.
        state: the state at entry.
        loss_scale: the factor by which the optimizer multiplies losses, or None for 1.
        fixed: indices of variables that no mask may perturb.
        earlier: T ascent directions from earlier steps, each a tensor or None; empty if the step
            has an ascent pass.
    """

    evaluator: Evaluator
    config: ESAMConfig
    plan: Plan
    inputs: dict[str, Tensor]
    state: State
    loss_scale: Tensor | None = None
    fixed: frozenset[int] = frozenset()
    earlier: Sequence[Tensor | None] = ()

    def at_theta(self, chosen: Sequence[int]) -> AtTheta:
        """The pass at theta, on the batch or a part of it, with the gradients of chosen variables.

        If no variable is chosen, only the derivatives by the factors are computed.
        """
        b = batch_size(self.evaluator.batch[0])
        routed = self.evaluator.route is not None
        ascent = self.plan.ascent
        on_a_part = ascent.of == "part"

        def state(arguments: list[Tensor]) -> State:
            trainable = list(self.state.trainable)
            for t, value in zip(chosen, arguments, strict=False):  # the factor is last
                trainable[t] = value
            return self.state._replace(trainable=trainable)

        def scaled_loss(arguments: list[Tensor], cut: Cut) -> tuple[Tensor, Evaluated]:
            factor = arguments[-1] if routed else None
            evaluate = self._evaluate_part if on_a_part else self._evaluate_batch
            evaluated = evaluate(state(arguments), factor, self._cut(cut, chosen))
            return self._scale_loss(evaluated.loss), evaluated

        arguments = [self.state.trainable[t] for t in chosen]
        if routed:
            arguments.append(self._part_factor(b) if on_a_part else _ones(b))
        found, evaluated = self._backend.gradients(
            scaled_loss,
            arguments,
            again=lambda values: self.evaluator.again(state(values), running=ascent.part_alone),
        )
        if not self._backend.keeps_assigned:
            kept = evaluated.state._replace(trainable=self.state.trainable)
            evaluated = evaluated._replace(state=kept)
        losses = self._per_sample(found.pop(), b) if routed else None
        if on_a_part and not ascent.scores:
            losses = ops.take(losses, self.inputs["part"], axis=0)
        return AtTheta(found, evaluated, losses)

    def _evaluate_batch(self, state: State, factor: Tensor | None, cut: Cut) -> Evaluated:
        """Return the loss of the whole batch."""
        records = self.plan.ascent.records
        return self.evaluator.evaluate(state, factor, cut=cut, records=records)

    def _evaluate_part(self, state: State, factor: Tensor | None, cut: Cut) -> Evaluated:
        """Return the loss of the part of the batch.

        If the selection needs the losses of the other samples, a pass without a graph computes
        their predictions. If not, the part's predictions are repeated.
        """
        ascent, part = self.plan.ascent, self.inputs["part"]
        fill: Fill | None = None
        if ascent.scores:
            rest = self.inputs["rest"]

            def others() -> Any:
                return self.evaluator.predict_rows(self.state, rest, running=ascent.rest_alone)

            fill = fill_from_rest(others, part, rest)
        return self.evaluator.evaluate_rows(
            state,
            factor,
            part,
            fill,
            cut=cut,
            running=ascent.part_alone,
            records=ascent.records,
            logs=not ascent.scores,
        )

    def _part_factor(self, b: int | Tensor) -> Tensor:
        """Return the factors with which the batch's loss is the loss of the part."""
        part = self.inputs["part"]
        n = ops.shape(part)[0]
        share = ops.cast(b, wide_floatx()) / ops.cast(n, wide_floatx())
        return spread(part, ops.broadcast_to(share, (n,)), b)

    def perturbed_losses(self, climbed: list[Tensor], b: int | Tensor) -> Tensor:
        """Phase 4: the losses at theta + epsilon, differentiated only by the factors."""
        state = self.state._replace(trainable=climbed)

        def loss(arguments: list[Tensor], _: Cut) -> tuple[Tensor, None]:
            return self.evaluator.evaluate(state, arguments[0]).loss, None

        (derivative,), _ = self._backend.gradients(
            loss, [_ones(b)], again=lambda _: self.evaluator.again(state, running=False)
        )
        return self._per_sample(derivative, b, scaled=False)

    def descent(
        self,
        climbed: list[Tensor],
        at_theta: Evaluated | None,
        selected: Selected | None,
        poison: Tensor,
    ) -> Descent:
        """Phase 5: the gradient of the sum of w_i l_i(theta + epsilon) for every variable.

        The predictions of the selected samples replace those of the ascent pass, and the loss is
        that of the whole batch with factors b w_i, or 0 for rejected samples. Therefore l_i is the
        same function in every pass, for any divisor in the loss.

        Args:
            climbed: T tensors theta + epsilon.
            at_theta: the pass at theta, or None if there is none.
            selected: the samples, or None for all.
            poison: 1, or NaN if something was not finite.
        """
        evaluator, b = self.evaluator, batch_size(self.evaluator.batch[0])
        running, records = self.plan.kept == "one", not self.plan.ascent.records
        count = len(climbed)
        rest = self.state
        if running and at_theta is not None:
            entry = self.state.non_trainable
            statistics = evaluator.with_statistics_of(at_theta.state, entry)
            rest = self.state._replace(non_trainable=statistics)

        def scaled_loss(arguments: list[Tensor], cut: Cut) -> tuple[Tensor, Evaluated | None]:
            state = rest._replace(trainable=arguments[:count])
            factor = arguments[count] if len(arguments) > count else self._factor(selected, b)
            how: Any = {"cut": cut, "running": running, "records": records}
            if selected is None:
                evaluated = evaluator.evaluate(state, factor, **how)
            else:
                fill = self._fill(selected, at_theta)
                how["logs"] = at_theta is None
                evaluated = evaluator.evaluate_rows(state, factor, selected.indices, fill, **how)
            loss = self._scale_loss(evaluated.loss * ops.cast(poison, evaluated.loss.dtype))
            return loss, evaluated if records else None

        arguments = list(climbed)
        if at_theta is None and evaluator.route is not None:
            arguments.append(_ones(b) if selected is None else self._factor(selected, b))
        gradients, evaluated = self._backend.gradients(
            scaled_loss,
            arguments,
            again=lambda values: self.evaluator.again(
                rest._replace(trainable=values[:count]), running=running
            ),
        )
        losses = self._per_sample(gradients.pop(), b) if len(arguments) > count else None
        if losses is not None and selected is not None:
            losses = ops.take(losses, selected.indices, axis=0)
        if evaluated is not None:
            evaluated = self._at_theta_again(evaluated, climbed, at_theta)
        return Descent(gradients, evaluated, losses)

    # -- helpers ------------------------------------------------------------------------------

    @property
    def _backend(self) -> Backend:
        """The backend."""
        return self.evaluator.backend

    def _factor(self, selected: Selected | None, b: int | Tensor) -> Tensor | None:
        """Return the factors b w_i of the samples, None for 1."""
        if selected is None:
            return None
        return spread(selected.indices, selected.weights * ops.cast(b, selected.weights.dtype), b)

    def _fill(self, selected: Selected, at_theta: Evaluated | None) -> Fill | None:
        """Return the predictions for rejected samples; None if they are unknown."""
        if at_theta is None or not self.plan.ascent.sees_all:
            return None
        without = self._backend.without_gradient
        return fill_from_batch(at_theta.y_pred, at_theta.masks, selected.indices, without)

    def _at_theta_again(
        self, evaluated: Evaluated, climbed: list[Tensor], at_theta: Evaluated | None
    ) -> Evaluated:
        """Return the descent pass with the trained weights at theta.

        Raises:
            ESAMRuntimeError: the pass assigned trained weights, and there was no pass at theta.
        """
        if at_theta is not None:
            trainable = at_theta.state.trainable
        else:
            trainable = self.state.trainable
            left = zip(evaluated.state.trainable, climbed, strict=True)
            if self._backend.keeps_assigned and any(new is not old for new, old in left):
                raise ESAMRuntimeError(
                    "A model whose calls assign trained weights, as `SpectralNormalization` does, "
                    "needs a pass at the unperturbed weights: use ascend=Batch() or Part(share). "
                    f"Received: ascend={self.config.ascend!r}."
                )
        return evaluated._replace(state=evaluated.state._replace(trainable=trainable))

    def _cut(self, cut: Cut, chosen: Sequence[int]) -> Cut:
        """Return a cut for the chosen variables, by their indices in the model."""
        at = {t: place for place, t in enumerate(chosen)}

        def cut_chosen(t: int, value: Tensor) -> Tensor:
            return cut(at[t], value) if t in at else self._backend.without_gradient(value)

        return cut_chosen

    def _per_sample(self, derivative: Any, b: int | Tensor, *, scaled: bool = True) -> Tensor:
        """Return l_i, in float32 or wider, from the derivative with respect to the factors.

        Args:
            derivative: (b,), of the loss.
            b: the batch size.
            scaled: whether the loss was scaled by the optimizer.
        """
        wide = widen(derivative)
        if scaled and self.loss_scale is not None:
            wide = wide / ops.cast(self.loss_scale, wide.dtype)
        return wide * ops.cast(b, wide.dtype)

    def _scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss scaled by the optimizer."""
        return loss if self.loss_scale is None else loss * ops.cast(self.loss_scale, loss.dtype)

    def _unscale(self, theta: Tensor, gradient: Tensor | None) -> Tensor:
        """Return an ascent gradient without the scale, dense, or 0 if there is none."""
        if gradient is None:
            return ops.zeros_like(theta)
        gradient = self._backend.dense(gradient)
        if self.loss_scale is None:
            return gradient
        gradient = widen(gradient)
        return gradient / ops.cast(self.loss_scale, gradient.dtype)


def _ones(b: int | Tensor) -> Tensor:
    """Return the factors f_i = 1."""
    return ops.ones((b,), dtype=keras.config.floatx())
