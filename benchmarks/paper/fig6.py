"""Figure 6: cosines of subset gradients with the whole batch's gradient.

They are measured after each epoch of a run, on a few batches, at SAM's perturbed weights, for the
selected samples (largest increase), the rejected ones, a random subset and, in addition to the
paper, the samples with the largest loss. Each subset has its own BatchNorm statistics, as in the
descent pass.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.arguments import count_number, method_name
from benchmarks.figures import curves
from benchmarks.paper.gradients import cosine, length, point_of, shift
from benchmarks.paper.options import parse
from benchmarks.paper.training_figure import (
    epoch_means,
    perturbing_runs,
    train_with_probes,
    write_epochs,
)
from benchmarks.training import Probe, Trainer
from esam_core.selectors import random_indices, subset_size

__all__ = ["main"]

NAMES = ("largest increase", "smallest increase", "random", "largest loss")


def _subsets(
    losses: Tensor, increase: Tensor, drawn: NDArray[np.integer[Any]]
) -> dict[str, Tensor]:
    """Return the indices of each subset, all of the same size as the random one."""
    k = len(drawn)
    order = torch.argsort(increase, descending=True, stable=True)
    return {
        "largest increase": order[:k],
        "smallest increase": order[-k:],
        "random": torch.from_numpy(drawn).to(losses.device),
        "largest loss": torch.argsort(losses, descending=True, stable=True)[:k],
    }


class Cosines(Probe):
    """Cosines of subset gradients with the batch's, over the first batches of an epoch."""

    def __init__(self, batches: int) -> None:
        self.options: dict[str, Any] = {"name": "fig6", "batches": batches}
        self._batches = batches

    def observe(self, epoch: int, report: object) -> None:
        """Do nothing: the steps are not needed."""

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, float]:
        run = trainer.run
        found: dict[str, list[float]] = {name: [] for name in NAMES}
        for i, (x, y) in enumerate(islice(trainer.source.epoch(epoch), self._batches)):
            point = point_of(trainer)
            k = subset_size(run.gamma, len(y))
            losses = point.losses(x, y)
            gradient = torch.autograd.grad(losses.mean(), point.parameters)
            before = losses.detach()
            scale = run.effective_rho / (length(gradient) + 1e-12)
            with shift(point, [scale * g for g in gradient]):
                with torch.no_grad():
                    increase = point.losses(x, y) - before
                whole = point.gradient(x, y)
                drawn = random_indices(len(y), k, seed=run.seed, count=epoch * self._batches + i)
                for name, chosen in _subsets(before, increase, drawn).items():
                    found[name].append(cosine(point.gradient(x[chosen], y[chosen]), whole))
        return {name: mean(values) for name, values in found.items()}


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batches", type=count_number, default=4, help="batches per epoch (default: 4)"
    )
    parser.add_argument(
        "--method", type=method_name, default="sam", help="method that trains (default: sam)"
    )


def main(arguments: Sequence[str] = ()) -> None:
    """Train, write and draw."""
    options = parse(
        "fig6",
        __doc__,
        arguments,
        add=_add,
        quick={"batches": 2, "epochs": 5},
        check=lambda o: perturbing_runs(o, o.method, arguments),
    )
    runs = perturbing_runs(options, options.method, arguments)
    values = epoch_means(train_with_probes(runs, lambda: Cosines(options.batches), options), NAMES)

    def against(name: str, other: str) -> str:
        pairs = list(zip(values[name], values[other], strict=True))
        held = sum(a > b for a, b in pairs)
        means = f"{mean(values[name]):.3f}, {mean(values[other]):.3f}"
        return f"in {held} of {len(pairs)} epochs; means {means}"

    claims = (
        ("largest increase", "random"),
        ("largest increase", "smallest increase"),
        ("largest loss", "largest increase"),
    )
    verdicts = {f"{a} is closer to the batch than {b}": against(a, b) for a, b in claims}
    title = f"Figure 6: cosine of a subset's gradient with the batch's, {options.data}"
    write_epochs(options, "fig6", title, values, verdicts)
    epochs = ("epoch", list(range(1, len(values["random"]) + 1)))
    lines = {f"{name} (gamma = {runs[0].gamma:g})": v for name, v in values.items()}
    curves(options.out / "fig6.png", title=title, x=epochs, y="cosine", lines=lines)
