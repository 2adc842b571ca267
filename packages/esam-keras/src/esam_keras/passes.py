"""The passes of one step as a pure function of the model's state, the same on every backend.

Nothing here assigns to a variable: each pass runs in a `keras.StatelessScope`, in which the
model's variables have the values that the pass is to see. So theta is never overwritten, moving
statistics and seed generators start each pass from the state at entry, and what the ascent pass
made of them is returned, to be kept by the caller once nothing can fail any more.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import keras
from keras import ops, tree
from keras.src.backend import get_keras_mask, set_keras_mask

from esam_core import ESAMConfig
from esam_keras.losses import Batch, check_scalar, weighted
from esam_keras.modes import running_statistics
from esam_keras.perturbation import Ascent, perturb, widened
from esam_keras.plan import Plan
from esam_keras.selection import Selected, select
from esam_keras.units import statistics_layers

__all__ = ["Backend", "Outcome", "State", "Step", "batch_size", "loss_scale", "mapped"]

Tensor = Any


class State(NamedTuple):
    """Values of a model's variables, as tensors, in the order of Keras's properties."""

    trainable: list[Tensor]
    non_trainable: list[Tensor]
    metrics: list[Tensor]


class Backend(Protocol):
    """What a Keras backend does in its own way."""

    def gradients(
        self,
        function: Callable[[list[Tensor]], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        """Return the derivative of the function's first result by its arguments, and the rest.

        `again` is the context in which the function ran its forward: what is checkpointed runs
        once more while the derivative is taken, and must find the same values.
        """
        ...

    def dense(self, gradient: Tensor) -> Tensor:
        """Return a gradient as an ordinary tensor."""
        ...

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        """Return tensors of 0 and 1, drawn natively, of the parameters' shapes."""
        ...

    def pass_context(self, model: keras.Model, running: bool) -> AbstractContextManager[Any]:
        """Return the context of one pass: state that Keras does not know starts as at entry.

        `running` says that normalisation is by running statistics, those after the ascent pass.
        """
        ...


class Evaluated(NamedTuple):
    """What a forward pass left: the loss, the predictions and their masks, the new state."""

    loss: Tensor
    y_pred: Any
    masks: list[Tensor | None]
    state: State

    def predictions(self) -> Any:
        """Return the predictions with their masks, which transformations strip."""
        leaves = tree.flatten(self.y_pred)
        for leaf, mask in zip(leaves, self.masks, strict=True):
            if mask is not None:
                set_keras_mask(leaf, mask)
        return tree.pack_sequence_as(self.y_pred, leaves)


@dataclass(frozen=True)
class Outcome:
    """What the passes of a step return.

    Args:
        gradients: T descent gradients, scaled as the optimizer scales its loss; None where the
            loss does not depend on a variable.
        ascent: the ascent pass: its state is the one to keep.
        finite: whether everything seen was finite.
        report: arrays for the `StepReport`, by field name.
    """

    gradients: list[Tensor | None]
    ascent: Evaluated
    finite: Tensor
    report: dict[str, Tensor] = field(default_factory=dict)


def batch_size(x: Any) -> int | Tensor:
    """Return the number of samples: static where known, else a tensor."""
    first = next(leaf for leaf in tree.flatten(x) if leaf is not None)
    return ops.shape(first)[0]


def mapped(variables: Sequence[Any], values: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
    """Return the pairs that a stateless scope takes."""
    return list(zip(variables, values, strict=True))


def loss_scale(optimizer: Any) -> Tensor | None:
    """Return what an optimizer multiplies losses by, or None for 1."""
    scale = optimizer.scale_loss(1.0)
    return None if isinstance(scale, float) and scale == 1.0 else scale


@dataclass
class Step:
    """The passes of one perturbed step.

    Args:
        backend: the native parts.
        model: compiled and built.
        config: the hyperparameters.
        plan: what the step is specialised on.
        inputs: what changes from step to step.
        route: how samples are told apart: see `esam_keras.losses`.
        state: at entry.
        batch: (x, y, sample_weight).
        loss_scale: what the optimizer multiplies losses by, or None for 1.
        fixed: places of variables that no mask may hit.
    """

    backend: Backend
    model: keras.Model
    config: ESAMConfig
    plan: Plan
    inputs: dict[str, Tensor]
    route: str | None
    state: State
    batch: Batch
    loss_scale: Tensor | None = None
    fixed: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._latest = self.state

    def run(self) -> Outcome:
        """Return the gradients for the update and all that the pass at theta left."""
        b = batch_size(self.batch[0])
        return self._perturbed_step(b) if self.plan.active else self._base_step(b)

    def _base_step(self, b: int | Tensor) -> Outcome:
        """Nothing is perturbed: forward and backward of the whole batch, and no more."""
        everything = list(range(len(self.state.trainable)))
        gradients, evaluated, losses = self._pass_at_theta(everything, b)
        report = {} if losses is None else {"losses": losses}
        return Outcome(gradients, evaluated, ops.isfinite(evaluated.loss), report)

    def _perturbed_step(self, b: int | Tensor) -> Outcome:
        """Phases 2 to 5."""
        at_theta, ascent, losses = self._ascent(b)
        climbed = [
            theta if e is None else theta + ops.cast(e, theta.dtype)
            for theta, e in zip(self.state.trainable, ascent.perturbations, strict=True)
        ]
        finite = ascent.finite
        perturbed = None
        selected = None
        if losses is not None:
            finite = ops.logical_and(finite, ops.all(ops.isfinite(losses)))
        if self._selects(b):
            if self.config.select.score == "increase":
                perturbed = self._selection(climbed, b)
                finite = ops.logical_and(finite, ops.all(ops.isfinite(perturbed)))
            selected = select(self.config.select, losses, perturbed, self.inputs, b)
        gradients = self._descent(climbed, b, at_theta, selected, finite)
        report = {
            "perturbation_norm": ascent.perturbation_norm,
            "gradient_norm": ascent.gradient_norm,
        }
        if losses is not None:
            report["losses"] = losses
        if perturbed is not None:
            report["perturbed_losses"] = perturbed
        if selected is not None:
            report["indices"] = selected.indices
            poison = ops.where(finite, 1.0, float("nan"))
            report["sample_weights"] = selected.weights * ops.cast(poison, selected.weights.dtype)
        return Outcome(gradients, at_theta, finite, report)

    # -- passes ------------------------------------------------------------------------------------

    def _ascent(self, b: int | Tensor) -> tuple[Evaluated, Ascent, Tensor | None]:
        """Phases 2 and 3: the pass at theta, its gradient for the masked units, and epsilon."""
        theta = self.state.trainable
        scale = self._scale()
        chosen = [
            t
            for t in range(len(theta))
            if t not in self.fixed and (self.config.norm == "full" or scale[t] is not None)
        ]
        found, evaluated, losses = self._pass_at_theta(chosen, b)
        gradients: list[Tensor | None] = [None] * len(theta)
        for t, g in zip(chosen, found, strict=True):
            gradients[t] = self._unscaled(theta[t], g)
        masks = None
        if self.plan.weight_beta is not None:
            masks = self.backend.weight_masks(
                self.inputs["weight_seed"], theta, self.plan.weight_beta
            )
        factors = [0.0 if s is None else s for s in scale]
        return evaluated, perturb(gradients, theta, factors, self.config, masks), losses

    def _pass_at_theta(
        self, chosen: Sequence[int], b: int | Tensor
    ) -> tuple[list[Tensor | None], Evaluated, Tensor | None]:
        """Return the scaled gradients by the chosen variables, the evaluation, and the losses."""

        def scaled_loss(arguments: list[Tensor]) -> tuple[Tensor, Evaluated]:
            *values, factor = arguments if self.route else (*arguments, None)
            trainable = list(self.state.trainable)
            for t, value in zip(chosen, values, strict=True):
                trainable[t] = value
            state = self.state._replace(trainable=trainable)
            evaluated = self._evaluate(state, factor)
            return self._scaled(evaluated.loss), evaluated

        arguments = [self.state.trainable[t] for t in chosen]
        if self.route:
            arguments.append(self._ones(b))
        found, evaluated = self.backend.gradients(scaled_loss, arguments, again=self._again)
        losses = self._per_sample(found.pop(), b) if self.route else None
        return found, evaluated, losses

    def _selection(self, climbed: list[Tensor], b: int | Tensor) -> Tensor:
        """Phase 4: the losses at theta + epsilon; only they are differentiated, by the factors."""

        def loss(arguments: list[Tensor]) -> tuple[Tensor, None]:
            state = self.state._replace(trainable=climbed)
            return self._evaluate(state, arguments[0]).loss, None

        (derivative,), _ = self.backend.gradients(loss, [self._ones(b)], again=self._again)
        return cast(Tensor, derivative) * ops.cast(b, cast(Tensor, derivative).dtype)

    def _descent(
        self,
        climbed: list[Tensor],
        b: int | Tensor,
        at_theta: Evaluated,
        selected: Selected | None,
        finite: Tensor,
    ) -> list[Tensor | None]:
        """Phase 5: the gradient of the sum of w_i l_i(theta + epsilon) for every variable.

        The predictions of the selected samples take their places among the ascent's, and the loss
        is that of the whole batch with the factors b w_i, and 0 for the rejected: so l_i is one
        and the same function in every pass, whatever the loss divides by.
        """

        def scaled_loss(trainable: list[Tensor]) -> tuple[Tensor, None]:
            state = self.state._replace(trainable=trainable)
            if self.plan.kept == "one":
                state = state._replace(non_trainable=self._with_statistics_of(at_theta.state))
            if selected is None:
                loss = self._evaluate(state, None, running=self.plan.kept == "one").loss
            else:
                loss = self._evaluate_selected(state, b, at_theta, selected)
            # What is not finite must be seen in the gradient, even if the samples that were
            # selected are harmless.
            poison = ops.where(finite, 1.0, float("nan"))
            return self._scaled(loss * ops.cast(poison, loss.dtype)), None

        gradients, _ = self.backend.gradients(scaled_loss, climbed, again=self._again)
        return gradients

    # -- evaluations -------------------------------------------------------------------------------

    def _evaluate(self, state: State, factor: Tensor | None, *, running: bool = False) -> Evaluated:
        """Return the loss of the whole batch in a state, sample i counted factor_i-fold."""
        model, batch = self.model, self.batch
        with self._scope(state) as scope:
            y_pred = self._forward(batch[0], running=running)
            masks = [get_keras_mask(leaf) for leaf in tree.flatten(y_pred)]
            loss = self._loss(batch, y_pred, factor)
        return Evaluated(
            loss,
            y_pred,
            masks,
            State(
                state.trainable,
                [scope.get_current_value(v) for v in model.non_trainable_variables],
                [scope.get_current_value(v) for v in model.metrics_variables],
            ),
        )

    def _evaluate_selected(
        self, state: State, b: int | Tensor, at_theta: Evaluated, selected: Selected
    ) -> Tensor:
        """Return the loss of the batch in which only the selected samples count and are run."""
        chosen = tree.map_structure(
            lambda leaf: None if leaf is None else ops.take(leaf, selected.indices, axis=0),
            self.batch[0],
        )
        places = ops.expand_dims(selected.indices, axis=-1)
        weights = selected.weights * ops.cast(b, selected.weights.dtype)
        factor = ops.scatter_update(ops.zeros_like(self._ones(b)), places, weights)
        with self._scope(state):
            run = self._forward(chosen, running=self.plan.kept == "one")
            leaves = []
            for before, mask, now in zip(
                tree.flatten(at_theta.y_pred), at_theta.masks, tree.flatten(run), strict=True
            ):
                if not _has_rows(before, now, selected.indices):
                    leaves.append(now)  # no prediction for each sample: of the selected, as it is
                    continue
                leaf = ops.scatter_update(ops.stop_gradient(before), places, now)
                if mask is not None:
                    set_keras_mask(leaf, mask)
                leaves.append(leaf)
            y_pred = tree.pack_sequence_as(at_theta.y_pred, leaves)
            return self._loss(self.batch, y_pred, factor)

    def _scope(self, state: State) -> Any:
        """Return a scope in which the model's variables have a state's values."""
        self._latest = state
        model = self.model
        return keras.StatelessScope(
            mapped(model.trainable_variables, state.trainable)
            + mapped(model.non_trainable_variables, state.non_trainable)
            + mapped(model.metrics_variables, state.metrics),
            collect_losses=True,
        )

    def _again(self) -> Any:
        """Return a scope with the values of the latest forward."""
        return self._scope(self._latest)

    def _forward(self, x: Any, *, running: bool) -> Any:
        """Return the predictions in training mode; `running` is for a single sample."""
        model = self.model
        with self.backend.pass_context(model, running), running_statistics(model, when=running):
            return model(x, training=True) if model._call_has_training_arg else model(x)

    def _loss(self, batch: Batch, y_pred: Any, factor: Tensor | None) -> Tensor:
        """Return the total loss, regularisation included."""
        with weighted(self.model, self.route, batch, factor) as (x, y, sample_weight):
            loss = self.model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
        check_scalar(loss)
        return loss

    def _with_statistics_of(self, state: State) -> list[Tensor]:
        """Return the non-trainable values at entry, moving statistics as another state has them."""
        statistics = {
            id(v) for layer in statistics_layers(self.model) for v in layer.non_trainable_variables
        }
        return [
            later if id(v) in statistics else entry
            for v, entry, later in zip(
                self.model.non_trainable_variables,
                self.state.non_trainable,
                state.non_trainable,
                strict=True,
            )
        ]

    # -- small things ------------------------------------------------------------------------------

    def _selects(self, b: int | Tensor) -> bool:
        """Say whether this step leaves samples out."""
        return self.plan.kept == "some" or (self.plan.kept == "one" and not _is_one(b))

    def _scale(self) -> list[Tensor | float | None]:
        """Return m_t / p_t for each variable; None for units that are known to be left alone."""
        count = len(self.state.trainable)
        if self.plan.scale is None:
            scale = self.inputs["scale"]
            return [None if t in self.fixed else scale[t] for t in range(count)]
        return [s if s > 0.0 else None for s in self.plan.scale]

    def _ones(self, b: int | Tensor) -> Tensor:
        """Return the factors f_i = 1."""
        return ops.ones((b,), dtype=keras.config.floatx())

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
        gradient = self.backend.dense(gradient)
        if self.loss_scale is None:
            return gradient
        gradient = widened(gradient)
        return gradient / ops.cast(self.loss_scale, gradient.dtype)


def _is_one(b: Any) -> bool:
    """Say whether a batch is known to be a single sample."""
    return isinstance(b, int) and b == 1


def _has_rows(before: Any, now: Any, indices: Any) -> bool:
    """Say whether an output has one row a sample: of the batch then, of the selected now."""
    if len(before.shape) == 0 or len(now.shape) == 0:
        return False
    return now.shape[0] is None or now.shape[0] == indices.shape[0]
