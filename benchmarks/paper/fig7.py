"""Figure 7: how linear the loss is along the perturbation, by beta, against SAM.

zeta(epsilon, B) = |L_B(theta + epsilon) - L_B(theta) - <epsilon, grad L_B(theta)>|, the measure of
Qin et al. 2019, applied to weights instead of inputs. It is 0 if the loss is linear. It is measured
after each epoch of a run, on a few batches, with masks drawn as in training, for two lengths of
epsilon: the length in the step, rho / beta under "masked", and SAM's length, rho, for all.
"""

import argparse
from collections.abc import Sequence
from itertools import islice, pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import count_number, open_share
from benchmarks.figures import draw_curves, panels, save
from benchmarks.paper.gradients import Point, inner, length, point_of, shift
from benchmarks.paper.options import parse
from benchmarks.paper.training_figure import (
    epoch_means,
    perturbing_runs,
    train_with_probes,
    write_epochs,
)
from benchmarks.training import Probe, Trainer
from esam_core import Bernoulli, Unit

__all__ = ["main"]


def _zeta(
    point: Point, x: Tensor, y: Tensor, gradient: Sequence[Tensor], epsilon: Sequence[Tensor]
) -> float:
    """Return zeta(epsilon, B), summing the losses in double precision."""
    with torch.no_grad():
        before = point.losses(x, y).double().mean()
        with shift(point, epsilon):
            after = point.losses(x, y).double().mean()
    return abs(float(after - before) - inner(epsilon, gradient))


class Linearity(Probe):
    """zeta for each beta and for SAM (beta = 1), over the first batches of an epoch."""

    def __init__(self, betas: Sequence[float], batches: int, draws: int) -> None:
        drawn = {"betas": list(betas), "batches": batches, "draws": draws}
        self.options: dict[str, Any] = {"name": "fig7", **drawn}
        self._betas, self._batches, self._draws = betas, batches, draws

    def observe(self, epoch: int, report: object) -> None:
        """Do nothing: the steps are not needed."""

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, float]:
        rho = trainer.run.effective_rho
        found: dict[str, list[float]] = {}
        point = point_of(trainer)
        units = [Unit(str(i), tuple(p.shape)) for i, p in enumerate(point.parameters)]
        for i, (x, y) in enumerate(islice(trainer.source.epoch(epoch), self._batches)):
            gradient = point.gradient(x, y)
            for beta in (*self._betas, 1.0):
                for draw in range(1 if beta == 1.0 else self._draws):
                    count = (epoch * self._batches + i) * self._draws + draw
                    mask = Bernoulli(beta).draw(units, seed=trainer.run.seed, count=count)
                    if not mask.active:
                        continue
                    masked = [m * g for m, g in zip(mask.perturbed, gradient, strict=True)]
                    scale = rho / (length(masked) + 1e-12)
                    for name, factor in ((_step(beta), 1 / beta), (_sam(beta), 1.0)):
                        epsilon = [scale * factor * g for g in masked]
                        found.setdefault(name, []).append(_zeta(point, x, y, gradient, epsilon))
        return {name: mean(values) for name, values in found.items()}


def _label(beta: float) -> str:
    return "SAM" if beta == 1.0 else f"beta = {beta:g}"


def _step(beta: float) -> str:
    return f"{_label(beta)}, the step's length"


def _sam(beta: float) -> str:
    return f"{_label(beta)}, SAM's length"


def _add(parser: argparse.ArgumentParser) -> None:
    betas = [0.3, 0.5, 0.6, 0.7, 0.9]
    parser.add_argument("--betas", nargs="+", type=open_share, default=betas, metavar="BETA")
    parser.add_argument(
        "--batches", type=count_number, default=4, help="batches per epoch (default: 4)"
    )
    parser.add_argument(
        "--draws", type=count_number, default=5, help="masks per batch (default: 5)"
    )


def main(arguments: Sequence[str] = ()) -> None:
    """Train, write and draw."""
    small = {"betas": [0.3, 0.6, 0.9], "batches": 2, "draws": 4, "epochs": 5}
    options = parse(
        "fig7",
        __doc__,
        arguments,
        add=_add,
        quick=small,
        check=lambda o: perturbing_runs(o, "esam", arguments),
    )
    runs = perturbing_runs(options, "esam", arguments)
    betas = (*options.betas, 1.0)
    names = [name(beta) for name in (_step, _sam) for beta in betas]
    records = train_with_probes(
        runs, lambda: Linearity(options.betas, options.batches, options.draws), options
    )
    values = epoch_means(records, names)
    means = {name: mean(values[name]) for name in names}

    def order_text(name: object) -> str:
        row = [means[name(beta)] for beta in betas]  # type: ignore[operator]
        held = all(a <= b for a, b in pairwise(row))
        listed = ", ".join(f"{_label(b)}: {v:.4g}" for b, v in zip(betas, row, strict=True))
        return f"{'yes' if held else 'no'} ({listed})"

    verdicts = {
        "zeta grows with beta, at the step's length (rho / beta)": order_text(_step),
        "zeta grows with beta, at SAM's length (rho)": order_text(_sam),
    }
    title = f"Figure 7: zeta, the distance from linear, {options.data}"
    write_epochs(options, "fig7", title, values, verdicts, details={"means": means})
    epochs = ("epoch", list(range(1, len(values[names[0]]) + 1)))
    figure, axes = panels(2, width=5.5)
    for axis, name, what in (
        (axes[0], _step, "epsilon with the step's length rho / beta"),
        (axes[1], _sam, "epsilon with SAM's length rho"),
    ):
        lines = {_label(beta): values[name(beta)] for beta in betas}
        draw_curves(axis, title=what, x=epochs, y="zeta (smaller: more linear)", lines=lines)
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, options.out / "fig7.png")
