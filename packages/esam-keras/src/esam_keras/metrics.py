"""Loss tracker and metrics: once a step, from the pass at theta, on the whole batch."""

from typing import Any

import keras
from keras import ops

from esam_keras.passes import Evaluated, batch_size, mapped

__all__ = ["logs_unless", "metrics_after"]

Tensor = Any


def metrics_after(
    model: keras.Model, ascent: Evaluated, batch: Any
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the logs and the values of the metrics' variables after a pass."""
    x, y, sample_weight = batch
    with keras.StatelessScope(mapped(model.metrics_variables, ascent.state.metrics)) as scope:
        model._loss_tracker.update_state(ascent.loss, sample_weight=batch_size(x))
        logs = model.compute_metrics(x, y, ascent.predictions(), sample_weight)
    return logs, [scope.get_current_value(v) for v in model.metrics_variables]


def logs_unless(
    model: keras.Model, ok: Tensor, logs: dict[str, Any], before: list[Tensor]
) -> dict[str, Any]:
    """Return the logs of a step that counts, or those from before it."""
    with keras.StatelessScope(mapped(model.metrics_variables, before)):
        old = model.get_metrics_result()
    return {
        name: ops.where(ok, value, old[name]) if name in old else value
        for name, value in logs.items()
    }
