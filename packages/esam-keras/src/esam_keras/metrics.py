"""The logs: loss and metrics of the samples that a step sees first, and ESAM's means."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from esam_keras import compat
from esam_keras.evaluation import Variables, batch_size
from esam_keras.rows import rows_of_batch
from esam_keras.scope import PassScope
from esam_keras.step import Outcome

__all__ = ["log_means", "log_sums", "logs_if", "metrics_after"]

Tensor = Any


def metrics_after(
    model: keras.Model,
    variables: Variables,
    outcome: Outcome,
    batch: Any,
    without_gradient: Callable[[Tensor], Tensor],
) -> tuple[dict[str, Any], list[tuple[Any, Tensor]]]:
    """Return the logs, and variables with their values after the metrics have seen the batch.

    These are the metrics' variables, in their order, and others that `compute_metrics` assigns to.

    Args:
        model: a compiled model.
        variables: its variables.
        outcome: of the passes.
        batch: (x, y, sample_weight).
        without_gradient: returns a value without a gradient.
    """
    seen, y_pred = outcome.seen, outcome.seen.evaluated.predictions()
    if seen.indices is not None:
        y_pred, masks = seen.evaluated.y_pred, seen.evaluated.masks
        b = batch_size(batch[0])
        batch, y_pred, masks = rows_of_batch((batch, y_pred, masks), seen.indices, b)
        y_pred = compat.with_masks(y_pred, masks)
    x, y, sample_weight = batch
    counted = seen.evaluated.state.metrics  # Keras counts the losses of several outputs in a pass
    values = {id(v): value for v, value in zip(variables.metrics, counted, strict=True)}
    with PassScope(values, lambda _, value: without_gradient(value)) as scope:
        compat.track_loss(model, seen.loss, batch_size(x))
        logs = model.compute_metrics(x, y, y_pred, sample_weight)
    return logs, [(v, values[id(v)]) for v in (*variables.metrics, *scope.strangers)]


def logs_if(
    model: keras.Model, variables: list[Any], ok: Tensor, logs: dict[str, Any], before: list[Tensor]
) -> dict[str, Any]:
    """Return the logs of a step if it counts, else the previous logs."""
    with PassScope({id(v): value for v, value in zip(variables, before, strict=True)}):
        old = model.get_metrics_result()
    return {
        name: ops.where(ok, value, old[name]) if name in old else value
        for name, value in logs.items()
    }


def log_sums(before: list[Tensor], report: dict[str, Tensor], b: Any) -> list[Tensor]:
    """Return the sums for the means after a step.

    Args:
        before: the sums before it: sharpness, steps with sharpness, sample shares, steps.
        report: the step's report.
        b: the batch size.
    """
    total, number, share, steps = before
    if "perturbed_losses" in report and "losses" in report:
        rise = ops.mean(report["perturbed_losses"] - report["losses"])
        total, number = total + ops.cast(rise, "float32"), number + 1.0
    kept: Any = 1.0
    if "indices" in report:
        k = ops.shape(report["indices"])[0]
        kept = ops.cast(k, "float32") / ops.cast(b, "float32")
    return [total, number, share + kept, steps + 1.0]


def log_means(sums: list[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the named means from the sums; NaN if no step had a value."""
    total, number, share, steps = sums
    parts = {"sharpness": (total, number), "sample_share": (share, steps)}
    return {name: parts[name][0] / parts[name][1] for name in names}
