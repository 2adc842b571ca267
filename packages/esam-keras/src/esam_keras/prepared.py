"""What is found about a compiled model before its first step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import keras

from esam_core import ESAMConfig, ESAMValueError
from esam_keras import compat
from esam_keras.plan import Planner
from esam_keras.routes import check_row_counts, check_rows, find_route
from esam_keras.rows import first_input
from esam_keras.trial import Trial
from esam_keras.units import has_moving_statistics, is_stored

__all__ = ["Prepared", "batch_size", "build", "first_axis", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """The properties of a model that are found before its first step.

    Args:
        planner: draws the plan of each step.
        route: how losses per sample are computed; see `esam_keras.losses`.
        fixed: indices of variables whose gradient is a value to be stored, as in float8 training.
        variables: identifies the trained variables.
        has_statistics: whether training updates moving statistics.
        tried: the number of samples of the batch that was used for the checks.
        outputs_with_rows: which outputs have one row per sample; None if no step runs some samples.
    """

    planner: Planner
    route: str | None
    fixed: frozenset[int]
    variables: tuple[int, ...]
    has_statistics: bool
    tried: int
    outputs_with_rows: tuple[bool, ...] | None

    @property
    def takes_rows(self) -> bool:
        """Whether steps run the model on some of the samples of a batch."""
        return self.outputs_with_rows is not None

    def still_holds(self, trained: Sequence[Any], b: int) -> bool:
        """Return whether this is true for b samples: one sample cannot depend on others."""
        return self.variables == _identities(trained) and (self.tried > 1 or b == 1)


def prepare(
    model: keras.Model,
    trained: Sequence[Any],
    config: ESAMConfig,
    planner: Planner,
    data: Any,
    state: Any,
    *,
    own_train_step: bool,
    context: Callable[[], AbstractContextManager[Any]],
) -> Prepared:
    """Return the properties of a built model, after checking it.

    Args:
        model: a compiled and built model.
        trained: its trained variables.
        config: the hyperparameters.
        planner: draws the plan of each step.
        data: a batch.
        state: JAX's state if it is not in the variables, else None.
        own_train_step: whether the user's own `train_step` may change the batch.
        context: returns the context of one evaluation of the model or its loss.

    Raises:
        ESAMValueError: the loss, the model or the batch do not allow what the steps need.
    """
    b = batch_size(data)
    takes_rows = config.uses_subsets and any(planner.allowed)
    if takes_rows:
        if not own_train_step:
            check_row_counts(data)
        for k in planner.subset_sizes(b):
            check_rows(model, data, k, state)
    trial = Trial(model, data, state, context)
    if takes_rows and trial.mixed_output is not None:
        raise ESAMValueError(
            "Each row of an output must be the prediction for one sample, because steps run the "
            "model on some samples only: use gamma=1.0 without ascend=Part(...). Received: an "
            f"output of shape {trial.mixed_output} for {b} samples."
        )
    return Prepared(
        planner=planner,
        route=find_route(trial, takes_rows),
        fixed=frozenset(t for t, v in enumerate(trained) if is_stored(v)),
        variables=_identities(trained),
        has_statistics=has_moving_statistics(model),
        tried=b,
        outputs_with_rows=trial.outputs_with_rows if takes_rows else None,
    )


def build(model: keras.Model, data: Any, *, own_train_step: bool) -> None:
    """Build a model, its metrics and its loss.

    Raises:
        ESAMValueError: the loss needs targets that only the user's `train_step` makes.
    """
    try:
        compat.build_from(model, data)
    except ValueError as error:
        _, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        if not own_train_step:
            raise
        if y is not None:
            raise ESAMValueError(
                "The data must have the form that the model and its loss need: ESAM builds both "
                "from the data before it calls your own `train_step`. If it changes the form of "
                "the targets, do that in the data or in your own `compute_loss`. Received: data "
                f"with which Keras raises: {error}"
            ) from error
        raise ESAMValueError(
            "The data must contain the targets: ESAM builds the loss before it calls your own "
            "`train_step`. Make them in the data, `fit(x, y)`, or in your own `compute_loss`. "
            "Received: a batch without targets."
        ) from error


def _identities(trained: Sequence[Any]) -> tuple[int, ...]:
    """Return a key that identifies the trained variables."""
    return tuple(id(v) for v in trained)


def batch_size(data: Any) -> int:
    """Return the number of samples of a batch.

    Raises:
        ESAMValueError: it is empty.
    """
    b = int(first_axis(data))
    if b == 0:
        raise ESAMValueError("The batch must not be empty. Received: a batch of 0 samples.")
    return b


def first_axis(data: Any) -> Any:
    """Return the size of a batch's first axis; None if a function is traced for any size."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    return first_input(x).shape[0]
