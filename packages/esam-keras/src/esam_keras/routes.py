"""Finding the route for losses per sample, before the first step.

The routes are those of `esam_keras.losses`. Whether a loss has losses per sample is tested on
artificial predictions; see `esam_keras.trial`.
"""

from typing import Any

import keras
import numpy as np
from keras import tree

from esam_core import ESAMValueError
from esam_core.draws import uniforms
from esam_keras import compat
from esam_keras.losses import ADVICE
from esam_keras.methods import has_own
from esam_keras.rows import row_count
from esam_keras.trial import Trial, output_spec

__all__ = ["check_row_counts", "check_rows", "find_route"]

#: The number of samples whose factors are varied; few, to save time.
TRIED = 4

#: Keras's functions that compute each sample's value from its own row.
SEPARATE = tuple(
    getattr(keras.losses, name)
    for name in (
        *("binary_crossentropy", "binary_focal_crossentropy", "categorical_crossentropy"),
        *("categorical_focal_crossentropy", "categorical_hinge", "hinge", "huber"),
        *("kl_divergence", "mean_absolute_error", "mean_absolute_percentage_error"),
        *("mean_squared_error", "mean_squared_logarithmic_error", "poisson"),
        *("sparse_categorical_crossentropy", "squared_hinge"),
    )
)

#: The relative error of a total that rounding may cause.
NOISE = 1e-5


def find_route(trial: Trial, needed: bool) -> str | None:
    """Return the route for a model's loss, after testing it.

    Args:
        trial: evaluates the loss.
        needed: whether the step needs losses per sample.

    Raises:
        ESAMValueError: losses per sample are needed but not available.
    """
    model = trial.model
    losses = compat.compiled_losses(model)
    plain = all(type(loss).__call__ is keras.losses.Loss.__call__ for loss in losses)
    if not has_own(model, "compute_loss"):
        if not compat.has_compiled_loss(model):
            return None  # `add_loss` has no losses per sample
        if plain:
            return _route_of_plain(trial, needed)
    problem, cause = "", None
    for route in ("values", "weights") if losses and plain else ("weights",):
        try:
            problem, cause = _problem(trial, route) or "", None
        except Exception as error:  # `compute_loss` is the user's code
            problem, cause = _describe(error), error
        if not problem:
            return route
    if not needed:
        return None
    raise ESAMValueError(
        "The loss must be linear in `sample_weight`, so that ESAM can compute each sample's loss. "
        f"Received: a loss that {problem}. {ADVICE}"
    ) from cause


def _describe(error: Exception) -> str:
    """Return the problem of a loss that raised an error; `fit` hides the cause of an error."""
    message = (str(error).strip() or "no message").splitlines()[0]
    return (
        "cannot be computed without a call of the model; it must use only its arguments and the "
        f"model's weights, not what `call` has stored ({type(error).__name__}: {message})"
    )


def _route_of_plain(trial: Trial, needed: bool) -> str | None:
    """Return the route for plain Keras losses, whose values are known.

    Most of Keras's own losses need no test: the artificial predictions of a large model cost time.
    """
    separate = all(map(_is_separate, compat.compiled_losses(trial.model)))
    if separate and needed:
        return "values"
    try:
        if separate:
            trial.total("values", np.ones(trial.b))
            return "values"
        depends = _depends_on_others(trial, "values")
    except ESAMValueError:  # no value for each sample
        if needed:
            raise
        return None
    except Exception:  # it is wrong, and the step raises the same, or needs other predictions
        return "values" if needed else None
    if not depends:
        return "values"
    if not needed:
        return None
    names = " and ".join(f"'{loss.name}'" for loss in compat.compiled_losses(trial.model))
    raise ESAMValueError(
        "A sample's loss must not depend on the predictions for other samples, because steps run "
        f"the model on some samples only. Received: the loss {names}, whose values do. {ADVICE}"
    )


def _is_separate(loss: Any) -> bool:
    """Return whether a loss is Keras's own, and uses only a sample's own row for its value."""
    own = type(loss).__module__.partition(".")[0] == "keras"
    return own and getattr(loss, "fn", None) in SEPARATE and getattr(loss, "axis", -1) != 0


def check_row_counts(data: Any) -> None:
    """Raise if an input has not one row per sample, so that samples cannot be taken out of it.

    Args:
        data: a batch. The number of its samples is that of the first input's rows.

    Raises:
        ESAMValueError: another input has another number of rows, or no axis.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    leaves = [(path, leaf) for path, leaf in tree.flatten_with_path(x) if leaf is not None]
    b = row_count(leaves[0][1])
    for path, leaf in leaves:
        n = row_count(leaf)
        if n != b and n is not None and b is not None:
            name = "".join(f"[{key!r}]" for key in path)
            raise ESAMValueError(
                "Every input must have one row per sample, so that samples can be taken out: use "
                "gamma=1.0 without ascend=Part(...), so that steps use the whole batch, or repeat "
                f"the input for each sample. Received: x{name} of shape "
                f"{tuple(getattr(leaf, 'shape', ()))} in a batch of {b} samples."
            )


def check_rows(model: keras.Model, data: Any, k: int, state: Any = None) -> None:
    """Raise if a model cannot run on k samples alone.

    Args:
        model: a compiled and built model.
        data: a batch.
        k: >= 1.
        state: as in `find_route`.

    Raises:
        ESAMValueError: its inputs are sparse, or its batch size is fixed.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    if any(compat.is_sparse(leaf) for leaf in tree.flatten(x)):
        raise ESAMValueError(
            "Samples cannot be taken out of a sparse tensor: use gamma=1.0 without "
            "ascend=Part(...), so that steps use the whole batch, or dense inputs. Received: a "
            "sparse tensor among the inputs."
        )
    stateful = [layer for layer in compat.flat_layers(model) if getattr(layer, "stateful", False)]
    fixed = f"the stateful layer '{stateful[0].name}'" if stateful else _fixed_input(model)
    if fixed is None:
        return
    cause = None
    try:
        if not stateful:
            output_spec(model, x, k, state)
            return
    except Exception as error:
        cause = error
    raise ESAMValueError(
        "A model with a fixed batch size cannot run on some samples alone: use gamma=1.0 without "
        "ascend=Part(...), so that steps use the whole batch, or leave the batch size open. "
        f"Received: {fixed}, and {k} samples."
    ) from cause


def _fixed_input(model: keras.Model) -> str | None:
    """Return a description of an input with a fixed batch size, or None."""
    for tensor in tree.flatten(getattr(model, "inputs", None) or ()):
        if tensor.shape[0] is not None:
            return f"the input '{tensor.name}' of shape {tuple(tensor.shape)}"
    return None


def _problem(trial: Trial, route: str) -> str | None:
    """Return the problem of a route, or None.

    The loss must be affine in every factor. Without a weight, a sample's predictions must not
    count, since steps may not compute them.
    """
    b = trial.b
    n = min(TRIED, b)
    mixed = np.array([0.5, 4.0, 2.0, 0.25])[:n]
    none = np.zeros(b)
    try:
        zero, again = trial.total(route, none), trial.total(route, none, none == 0)
        rows = np.eye(n, b)
        if not _differ(trial.total(route, mixed @ rows), zero):  # their own weights may be 0
            rows = np.roll(rows, _counting_sample(trial, route, zero), axis=1)
        alone = [trial.total(route, row) - zero for row in rows]
        together = trial.total(route, mixed @ rows) - zero
        depends = _depends_on_others(trial, route)
        divides = not np.isfinite(zero) and np.isfinite(trial.total(route, np.ones(b)))
    except ESAMValueError as error:
        return f"has no value per sample ({error})"
    noise = NOISE * (abs(zero) + abs(together))
    size = max(map(abs, (*alone, together)))
    if size <= noise:
        return "does not depend on `sample_weight`"
    if divides or abs(float(np.dot(mixed, alone)) - together) > 1e-3 * size + noise:
        return "is not linear in `sample_weight`"
    if _differ(zero, again):
        return "has a term in the predictions that is not weighted by `sample_weight`"
    if depends:
        return "depends on the predictions for samples whose `sample_weight` is 0"
    return None


def _counting_sample(trial: Trial, route: str, zero: float) -> int:
    """Return a sample whose factor changes the total, found by halving the batch.

    Args:
        trial: evaluates the loss.
        route: see `esam_keras.losses`.
        zero: the total with all factors 0.
    """
    places = np.arange(trial.b)
    while len(places) > 1:
        half, rest = np.array_split(places, 2)
        factors = np.isin(np.arange(trial.b), half).astype(float)
        places = half if _differ(trial.total(route, factors), zero) else rest
    return int(places[0])


def _depends_on_others(trial: Trial, route: str) -> bool:
    """Return whether samples' losses depend on the predictions for other samples.

    The predictions for about half of the samples are redrawn, while their factors are 0.
    """
    b = trial.b
    factors = 0.5 + uniforms(b, seed=0, count=1)
    half = uniforms(b, seed=1, count=1) < 0.5
    half[0], half[-1] = True, False
    totals = [
        [trial.total(route, np.where(others, 0.0, factors), redrawn) for redrawn in (None, others)]
        for others in (half, ~half)
    ]
    return any(_differ(before, after) for before, after in totals)


def _differ(a: float, b: float) -> bool:
    """Return whether two totals differ by more than rounding."""
    return abs(a - b) > NOISE * (abs(a) + abs(b))
