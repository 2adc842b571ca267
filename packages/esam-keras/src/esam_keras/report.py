"""The step report for Keras tensors of any backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

from esam_core import StepReport, Unit
from esam_keras.perturbation import widen
from esam_keras.plan import Drawn

__all__ = ["KerasReport", "step_report"]


@dataclass(frozen=True, eq=False)
class KerasReport(StepReport):
    """A `StepReport` whose properties `keras.ops` computes.

    They are in float32 or wider, so that means over steps are too: `RunningMeans` cannot widen
    TensorFlow's tensors. `losses` and `loss` are None if the loss has no value per sample.
    """

    def _difference(self, a: Any, b: Any) -> Any:
        return widen(a) - widen(b)

    def _mean(self, values: Any) -> Any:
        return ops.mean(widen(values))

    def _sum(self, values: Any) -> Any:
        return ops.sum(values)

    def _take(self, values: Any, indices: Any) -> Any:
        return ops.take(values, indices, axis=0)

    def _sorted(self, values: Any) -> Any:
        return ops.sort(values)


def step_report(
    count: int,
    drawn: Drawn,
    units: Sequence[Unit],
    allowed: Sequence[bool],
    arrays: Mapping[str, Any],
) -> KerasReport:
    """Return the report of a step that has run.

    Args:
        count: the number of the ascent.
        drawn: the drawn plan of the step.
        units: the units of the model.
        allowed: for each unit, whether it can be perturbed.
        arrays: what the step has measured, by the names of the report's fields; "ok", if it was
            checked whether the losses and gradients are finite.
    """
    measured = {"losses": None, **arrays}
    ok = measured.pop("ok", None)
    chosen = [u for u, m in zip(units, drawn.mask.perturbed, strict=True) if m]
    whole = sum(u.size for u, may in zip(units, allowed, strict=True) if may)
    share = sum(unit.size for unit in chosen) / whole if chosen else 0.0
    indices, part = measured.get("indices"), drawn.inputs.get("part")
    skipped = ok is not None and not bool(ok)
    if skipped:
        seen = "perturbed_losses" if measured["losses"] is None else "losses"
        measured = {"losses": None, seen: measured.get(seen)}
    return KerasReport(
        count=count,
        perturbed=() if skipped else tuple(unit.name for unit in chosen),
        weight_share=0.0 if skipped else share * (drawn.mask.weight_beta or 1.0),
        sample_share=1.0 if indices is None else len(indices) / drawn.batch_size,
        skipped=skipped,
        part=None if part is None else ops.convert_to_tensor(part),
        batch_size=drawn.batch_size,
        **measured,
    )
