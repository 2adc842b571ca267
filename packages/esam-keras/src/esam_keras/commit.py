"""The step where variables are assigned to: TensorFlow and torch.

The passes are a pure function of the state (see `esam_keras.passes`); what they found is written
to the variables at the end, when nothing of ours can fail any more.
"""

from typing import Any

import keras
from keras import ops

from esam_keras.metrics import logs_unless, metrics_after
from esam_keras.passes import State, Step, batch_size, loss_scale

__all__ = ["step"]

Tensor = Any


def step(training: Any, current: Any, data: Any) -> dict[str, Any]:
    """Make one step and return its logs: the twin of Keras's `train_step`."""
    model, esam, native = training.model, training.esam, training.native.NATIVE
    batch = keras.utils.unpack_x_y_sample_weight(data)
    entry = State(
        [native.value(v) for v in model.trainable_variables],
        [native.value(v) for v in model.non_trainable_variables],
        [native.value(v) for v in model.metrics_variables],
    )
    with native.whole_step(model):
        outcome = Step(
            native,
            model,
            esam.config,
            current.plan,
            current.inputs,
            training.route,
            entry,
            batch,
            loss_scale(model.optimizer),
            training.fixed,
        ).run()
    logs, counted = metrics_after(model, outcome.ascent, batch)
    sums_before = [native.value(v) for v in esam._log_sums]
    sums = training.log_sums(sums_before, outcome.report, batch_size(batch[0]))
    assigned = [
        *zip(
            model.non_trainable_variables,
            entry.non_trainable,
            outcome.ascent.state.non_trainable,
            strict=True,
        ),
        *zip(model.metrics_variables, entry.metrics, counted, strict=True),
        *zip(esam._log_sums, sums_before, sums, strict=True),
    ]

    def commit() -> None:
        for variable, before, after in assigned:
            if after is not before:
                variable.assign(after)
        with esam.stepping():
            native.apply(model.optimizer, outcome.gradients, model.trainable_variables)

    current.report = outcome.report
    if esam.config.on_nonfinite == "propagate":
        commit()
    else:
        found = [native.dense(g) for g in outcome.gradients if g is not None]
        ok = ops.logical_and(
            outcome.finite, ops.all(ops.stack([ops.all(ops.isfinite(g)) for g in found]))
        )
        native.keep_if(ok, commit)
        logs = logs_unless(model, ok, logs, entry.metrics)
        sums = [
            ops.where(ok, after, before) for after, before in zip(sums, sums_before, strict=True)
        ]
        current.report = {**outcome.report, "ok": ok}
    return training.with_means(logs, sums)
