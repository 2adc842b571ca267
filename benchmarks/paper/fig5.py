"""Figure 5: losses of the selected and rejected samples, before and after the perturbation.

All steps of a training run with ESAM are measured, and averaged by epoch. Equations 8 to 10 of the
paper state that the selected samples' losses increase most, and that they bound the batch's.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.figures import draw_curves, panels, save
from benchmarks.paper.options import parse
from benchmarks.paper.training_figure import (
    epoch_means,
    perturbing_runs,
    train_with_probes,
    write_epochs,
)
from benchmarks.run import Run
from benchmarks.training import Probe, Trainer
from esam_core.selectors import subset_size
from esam_torch import StepReport

__all__ = ["main"]

NAMES = (
    *("selected before", "selected after", "rejected before", "rejected after"),
    *("batch before", "batch after"),
)


class Splits(Probe):
    """Means, over an epoch's steps, of the losses of both parts of the batch."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {"name": "fig5"}
        self._sums: list[Any] = []

    def observe(self, epoch: int, report: StepReport | None) -> None:
        if report is None or report.perturbed_losses is None or report.indices is None:
            return
        before, after, chosen = report.losses, report.perturbed_losses, report.indices
        b, k = len(before), len(chosen)
        values = []
        for selected, whole in ((before[chosen], before), (after[chosen], after)):
            values.append((selected.mean(), (whole.sum() - selected.sum()) / (b - k), whole.mean()))
        self._sums.append([v for pair in zip(*values, strict=True) for v in pair])

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, float]:
        steps = len(self._sums)
        means = [float(sum(column)) / steps for column in zip(*self._sums, strict=True)]
        self._sums.clear()
        return dict(zip(NAMES, means, strict=True))


def _runs(options: argparse.Namespace, arguments: Sequence[str]) -> list[Run]:
    """Return the runs, after checking that batches are not split and some samples are rejected."""
    runs = perturbing_runs(options, "esam", arguments)
    run = runs[0]
    if run.m is not None and run.m < run.batch:
        raise ValueError(f"--m must be {run.batch}, the batch, or more. Received: {run.m}.")
    if subset_size(run.gamma, run.batch) == run.batch:
        raise ValueError(
            f"--gamma must leave out samples of a batch of {run.batch}. Received: {run.gamma:g}."
        )
    return runs


def main(arguments: Sequence[str] = ()) -> None:
    """Train, write and draw."""
    options = parse(
        "fig5", __doc__, arguments, quick={"epochs": 5}, check=lambda o: _runs(o, arguments)
    )
    runs = _runs(options, arguments)
    values = epoch_means(train_with_probes(runs, Splits, options), NAMES)
    rise = {
        part: [
            a - b for a, b in zip(values[f"{part} after"], values[f"{part} before"], strict=True)
        ]
        for part in ("selected", "rejected", "batch")
    }

    def in_epochs(name: str, other: str, source: dict[str, list[float]]) -> str:
        pairs = list(zip(source[name], source[other], strict=True))
        held = sum(a >= b for a, b in pairs)
        return f"held in {held} of {len(pairs)} epochs"

    verdicts = {
        "sharpness of the selected >= of the batch >= of the rejected (by construction)": (
            in_epochs("selected", "batch", rise) + "; " + in_epochs("batch", "rejected", rise)
        ),
        "perturbed loss of the selected >= of the batch": in_epochs(
            "selected after", "batch after", values
        ),
        "unperturbed loss of the selected >= of the batch": in_epochs(
            "selected before", "batch before", values
        ),
        "perturbed loss of the rejected >= unperturbed": in_epochs(
            "rejected after", "rejected before", values
        ),
    }
    title = f"Figure 5: losses of both parts of the batch under ESAM, {options.data}"
    write_epochs(options, "fig5", title, values, verdicts, details={"rise": rise})
    epochs = ("epoch", list(range(1, len(values["batch after"]) + 1)))
    figure, (left, right) = panels(2, width=5.5)
    draw_curves(left, title="losses", x=epochs, y="mean loss", lines=values)
    lines = {f"{part} samples": v for part, v in rise.items()}
    draw_curves(right, title="sharpness", x=epochs, y="increase of the mean loss", lines=lines)
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, options.out / "fig5.png")
