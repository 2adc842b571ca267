"""One forward pass and its loss in a given state, without assigning to variables.

A pass runs in a scope in which the model's variables have given values. Therefore theta is never
overwritten, moving statistics and seed generators start each pass from the state at entry, and
their new values are returned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from esam_keras import compat
from esam_keras.backends.base import Backend, Cut, Unknown
from esam_keras.losses import Batch, check_added_losses, check_scalar, weigh_samples
from esam_keras.rows import Fill, fill_by_repeating, first_input, row_count, rows, rows_of_batch
from esam_keras.running import running_statistics
from esam_keras.scope import PassScope
from esam_keras.units import statistics_layers

__all__ = ["Evaluated", "Evaluator", "State", "Variables", "batch_size"]

Tensor = Any


class State(NamedTuple):
    """Values of a model's variables, as tensors, in the order of Keras's properties."""

    trainable: list[Tensor]
    non_trainable: list[Tensor]
    metrics: list[Tensor]


class Variables(NamedTuple):
    """A model's variables, looked up once per step, because Keras collects them on each access.

    `trainable` are those that are trained; see `Backend.trained`.
    """

    trainable: list[Any]
    non_trainable: list[Any]
    metrics: list[Any]

    @staticmethod
    def of(model: keras.Model) -> "Variables":
        """Return the variables of a model, as Keras's JAX trainer divides them."""
        return Variables(
            model.trainable_variables, model.non_trainable_variables, model.metrics_variables
        )

    @staticmethod
    def split(model: keras.Model, trained: list[Any]) -> "Variables":
        """Return the variables of a model, of which only some are trained."""
        chosen = {id(v) for v in trained}
        others = [v for v in model.variables if id(v) not in chosen]
        return Variables(trained, others, model.metrics_variables)


class Evaluated(NamedTuple):
    """The results of a forward pass: the loss, the predictions and their masks, the new state.

    `strangers` are variables that the model does not list, such as the states of stateful RNNs,
    with the values that the pass assigned to them. `alone` is the loss of the samples that were run
    as a batch of their own, without a gradient, if that is another one.
    """

    loss: Tensor
    y_pred: Any
    masks: list[Tensor | None]
    state: State
    strangers: list[tuple[Any, Tensor]]
    alone: Tensor | None = None

    @property
    def logged(self) -> Tensor:
        """The loss for the logs."""
        return self.loss if self.alone is None else self.alone

    def predictions(self) -> Any:
        """Return the predictions with their masks, which transformations remove."""
        return compat.with_masks(self.y_pred, self.masks)


def batch_size(x: Any) -> int | Tensor:
    """Return the number of samples: static if known, else a tensor."""
    return ops.shape(first_input(x))[0]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model and its loss on a batch.

    Args:
        backend: the backend.
        unknown: the state that Keras does not know, in this step.
        model: a compiled and built model.
        route: how losses per sample are computed; see `esam_keras.losses`.
        variables: the model's variables.
        batch: (x, y, sample_weight).
        outputs_with_rows: which outputs have one row per sample; None if no step runs some samples.
    """

    backend: Backend
    unknown: Unknown
    model: keras.Model
    route: str | None
    variables: Variables
    batch: Batch
    outputs_with_rows: tuple[bool, ...] | None

    def evaluate(
        self,
        state: State,
        factor: Tensor | None,
        *,
        cut: Cut | None = None,
        running: bool = False,
        records: bool = False,
    ) -> Evaluated:
        """Return the loss of the whole batch in a state, with sample i weighted by factor_i.

        Args:
            state: the state in which the model runs.
            factor: (b,), or None for 1.
            cut: see `esam_keras.backends.base.Cut`.
            running: whether normalisation is by running statistics.
            records: whether the statistics and random state of this pass are kept.
        """
        with self.one_pass(state, cut=cut, running=running, records=records) as scope:
            y_pred = self._forward(self.backend.inputs_of_pass(self.batch[0]), running=running)
            masks = compat.masks_of(y_pred)
            loss = self._loss(y_pred, factor)
            self.unknown.check_loss(loss)
        return self._evaluate(scope, state, loss, y_pred, masks)

    def evaluate_rows(
        self,
        state: State,
        factor: Tensor | None,
        indices: Tensor,
        fill: Fill | None,
        *,
        cut: Cut | None = None,
        running: bool = False,
        records: bool = False,
        logs: bool = False,
    ) -> Evaluated:
        """Return the loss of some samples of the batch; the model runs on them alone.

        Args:
            state: the state in which the model runs.
            factor: (b,), 0 for samples that are not run; None if there are no losses per sample.
            indices: (k,), the places of the samples.
            fill: returns the predictions for the whole batch from those for these samples. None:
                they are repeated for the other samples, whose losses do not count.
            cut: as for `evaluate`.
            running: as for `evaluate`.
            records: as for `evaluate`.
            logs: whether the loss is logged.
        """
        with self.one_pass(state, cut=cut, running=running, records=records) as scope:
            run = self._forward(self._inputs(indices), running=running)
            check_added_losses(scope.losses)
            whole = fill or fill_by_repeating(
                indices, batch_size(self.batch[0]), self.backend.without_gradient
            )
            y_pred, masks = whole(run, compat.masks_of(run), self._with_rows(run, indices))
            loss = self._loss(compat.with_masks(y_pred, masks), factor, repeated=fill is None)
            self.unknown.check_loss(loss)
            alone = None
            if logs and fill is None and self._divides_by_weights:
                # Instead of what the loss above has counted, with the weights of all samples.
                metrics = zip(self.variables.metrics, state.metrics, strict=True)
                scope.state_mapping.update({id(v): value for v, value in metrics})
                alone = self._loss_alone(run, indices)
        return self._evaluate(scope, state, loss, y_pred, masks)._replace(alone=alone)

    @property
    def _divides_by_weights(self) -> bool:
        """Whether a loss is divided by the sum of the sample weights."""
        return self.route == "values" and any(
            getattr(loss, "reduction", None) == "mean_with_sample_weight"
            for loss in compat.compiled_losses(self.model)
        )

    def _loss_alone(self, run: Any, indices: Tensor) -> Tensor:
        """Return the loss of some samples as a batch of their own, given their predictions."""
        b = batch_size(self.batch[0])
        x, y, sample_weight = rows_of_batch(self.batch, indices, b)
        loss = compat.total_loss(self.model, x, y, run, sample_weight)
        return self.backend.without_gradient(loss)

    def predict_rows(
        self, state: State, indices: Tensor, *, running: bool = False
    ) -> tuple[Any, list[Tensor | None]]:
        """Return predictions for some samples without a graph, and their masks."""
        still = state._replace(
            trainable=[self.backend.without_gradient(value) for value in state.trainable]
        )
        with compat.added_losses_kept(self.model), self.one_pass(still, running=running):
            run = self._forward(self._inputs(indices), running=running)
        return tree.map_structure(self._still, run), compat.masks_of(run)

    def _inputs(self, indices: Tensor) -> Any:
        """Return the inputs of some samples."""
        return self.backend.split(rows(self.batch[0], indices))

    def _with_rows(self, run: Any, indices: Tensor) -> list[bool]:
        """Return which of the predictions for some samples have one row for each of them."""
        flat, known = tree.flatten(run), self.outputs_with_rows
        if known is None or len(known) != len(flat):  # training has other outputs
            known = (True,) * len(flat)
        return [
            has_rows and row_count(leaf) in (None, indices.shape[0])
            for leaf, has_rows in zip(flat, known, strict=True)
        ]

    def _still(self, leaf: Any) -> Any:
        """Return an output without its gradient; not every output is a tensor."""
        return self.backend.without_gradient(leaf) if hasattr(leaf, "shape") else leaf

    def _evaluate(
        self,
        scope: PassScope,
        state: State,
        loss: Tensor,
        y_pred: Any,
        masks: list[Tensor | None],
    ) -> Evaluated:
        """Return the results of a pass in a scope."""
        strangers = []
        if self.backend.keeps_assigned:
            strangers = [(v, scope.state_mapping[id(v)]) for v in scope.strangers]
        return Evaluated(loss, y_pred, masks, self._state_after(scope, state), strangers)

    @contextmanager
    def one_pass(
        self,
        state: State,
        *,
        cut: Cut | None = None,
        running: bool = False,
        records: bool = False,
        again: bool = False,
    ) -> Iterator[PassScope]:
        """Run a forward and its loss in a state; the arguments are those of `evaluate`.

        A pass may run inside another. `again` is for the parts of a pass that run again.
        """
        with (
            self._scope(state, cut) as scope,
            self.unknown.one_pass(running=running, records=records, again=again),
        ):
            yield scope

    @contextmanager
    def again(self, state: State, *, running: bool = False) -> Iterator[None]:
        """Run the checkpointed parts of a forward again, as in a pass with these arguments."""
        with (
            self.one_pass(state, running=running, again=True),
            running_statistics(self.model, when=running),
        ):
            yield

    def _scope(self, state: State, cut: Cut | None) -> PassScope:
        """Return a scope in which the model's variables have a state's values."""
        values = {
            id(variable): value
            for group, tensors in zip(self.variables, state, strict=True)
            for variable, value in zip(group, tensors, strict=True)
        }
        assigned = self._assigned(cut) if self.backend.keeps_assigned else None
        return self.backend.pass_scope(values, assigned)

    def _assigned(self, cut: Cut | None) -> Callable[[Any, Tensor], Tensor]:
        """Return the function that cuts the gradient of an assigned value, as Keras's `assign`."""
        places = {id(v): place for place, v in enumerate(self.variables.trainable)} if cut else {}

        def assigned(variable: Any, value: Tensor) -> Tensor:
            place = places.get(id(variable))
            if cut is None or place is None:
                return self.backend.without_gradient(value)
            return cut(place, value)

        return assigned

    def _state_after(self, scope: PassScope, state: State) -> State:
        """Return the state after a pass."""
        values = scope.state_mapping
        trainable = state.trainable
        if self.backend.keeps_assigned:
            trainable = [values[id(v)] for v in self.variables.trainable]
        return State(
            trainable,
            [values[id(v)] for v in self.variables.non_trainable],
            [values[id(v)] for v in self.variables.metrics],
        )

    def _forward(self, x: Any, *, running: bool) -> Any:
        """Return the predictions in training mode; `running` is for a single sample."""
        takes_training = compat.takes_training(self.model)
        with running_statistics(self.model, when=running):
            return self.model(x, training=True) if takes_training else self.model(x)

    def _loss(self, y_pred: Any, factor: Tensor | None, *, repeated: bool = False) -> Tensor:
        """Return the total loss, including regularisation.

        Args:
            y_pred: for the whole batch.
            factor: as for `evaluate`.
            repeated: whether the predictions for samples with the factor 0 are those of others.
        """
        weighed = weigh_samples(self.model, self.route, self.batch, factor, repeated=repeated)
        with weighed as (x, y, sample_weight):
            loss = compat.total_loss(self.model, x, y, y_pred, sample_weight)
        check_scalar(loss)
        return loss

    def with_statistics_of(self, state: State, entry: Sequence[Tensor]) -> list[Tensor]:
        """Return the non-trainable values at entry, with moving statistics from another state."""
        statistics = {
            id(v) for layer in statistics_layers(self.model) for v in layer.non_trainable_variables
        }
        return [
            later if id(v) in statistics else before
            for v, before, later in zip(
                self.variables.non_trainable, entry, state.non_trainable, strict=True
            )
        ]
