"""Loss landscapes: figure 4 (random directions) and figure 8 (adversarial directions).

Figure 4: two Gaussian directions, each filter rescaled to the norm of the network's own filter
(Li et al. 2018), and the losses averaged over several pairs. Figure 8: the two directions, along
which the loss increases fastest, are the gradients of the loss on the two halves of a batch, scaled
to the length of the perturbation. Networks are in evaluation mode; the loss is on training images.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import BoundaryNorm
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arguments import at_least, count_number, method_name, positive
from benchmarks.data.source import load_source
from benchmarks.figures import COLOURS, plt, save
from benchmarks.machine import provenance
from benchmarks.paper.gradients import length
from benchmarks.paper.options import parse, recipe_runs
from benchmarks.report import write_json, write_tables
from benchmarks.run import Run
from benchmarks.train import train, weights_path
from benchmarks.training import Trainer

__all__ = ["fig4", "fig8", "filter_normalised_direction"]


def filter_normalised_direction(
    parameters: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Return a Gaussian direction in which each filter has the norm of the network's filter.

    A filter is the weights of one output of a matrix or convolution. Vectors (norms, biases) are
    not moved, as in Li et al.

    Args:
        parameters: the network's parameters.
        generator: a generator on the CPU.
    """
    direction = []
    for parameter in parameters:
        if parameter.dim() < 2:
            direction.append(torch.zeros_like(parameter))
            continue
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        axes = tuple(range(1, parameter.dim()))
        norms = torch.linalg.vector_norm(drawn, dim=axes, keepdim=True)
        own = torch.linalg.vector_norm(parameter.detach(), dim=axes, keepdim=True)
        direction.append(drawn * own / (norms + 1e-10))
    return direction


def _adversarial(trainer: Trainer, x: Tensor, y: Tensor, radius: float) -> list[list[Tensor]]:
    """Return the gradients on both halves of a batch, each of length `radius`."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    directions = []
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        loss = F.cross_entropy(trainer.model(part_x), part_y)
        gradient = torch.autograd.grad(loss, parameters)
        scale = radius / (length(gradient) + 1e-12)
        directions.append([scale * g for g in gradient])
    return directions


@torch.no_grad()
def _grid(
    trainer: Trainer, directions: Sequence[Sequence[Tensor]], ends: Tensor, x: Tensor, y: Tensor
) -> list[list[float]]:
    """Return the loss at theta + a d1 + b d2, one row per a."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    copies = [p.detach().clone() for p in parameters]
    rows = []
    for a in ends.tolist():
        row = []
        for b in ends.tolist():
            for p, c, d1, d2 in zip(parameters, copies, *directions, strict=True):
                p.copy_(c).add_(d1, alpha=a).add_(d2, alpha=b)
            losses = [
                F.cross_entropy(trainer.model(part), labels, reduction="sum")
                for part, labels in zip(x.split(500), y.split(500), strict=True)
            ]
            row.append(float(torch.stack(losses).sum()) / len(y))
        rows.append(row)
    torch._foreach_copy_(parameters, copies)
    return rows


def _load_or_train(run: Run, options: argparse.Namespace) -> Trainer:
    """Return a run's trainer with its final weights, after training or loading it."""
    train(run, options.out, checkpoint_every=5, keep_weights=True)
    trainer = Trainer(run)
    path = weights_path(run, options.out)
    weights = torch.load(path, map_location=trainer.device, weights_only=True)
    trainer.model.load_state_dict(weights)
    trainer.model.eval()
    return trainer


def _images(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the training images for the loss, without augmentation."""
    source = load_source(
        options.data,
        batch=options.samples,
        seed=0,
        device=options.device,
        images=options.images,
        classes=options.classes,
        first_class=options.first_class,
        size=options.size,
        noise=options.noise,
        augment=False,
    )
    return next(source.epoch(0))


def _add(parser: argparse.ArgumentParser) -> None:
    add, methods = parser.add_argument, ["sgd", "sam", "esam"]
    add("--methods", nargs="+", type=method_name, default=methods, metavar="NAME")
    add("--points", type=at_least(2), default=25, help="points per side (default: 25)")
    add("--samples", type=at_least(2), default=2000, help="images for the loss (default: 2000)")
    add("--groups", type=count_number, default=3, help="pairs of directions (default: 3)")
    add("--reach", type=positive, help="range of both axes (fig4: 0.5; fig8: 3 rho)")


def _draw(name: str, title: str, axis: str, grids: dict[str, Any], ends: Tensor, out: Any) -> None:
    """Draw a contour plot for each method and a cut through all of them."""
    count = len(grids)
    figure, axes = plt.subplots(
        1, count + 1, figsize=(4.0 * (count + 1), 4), squeeze=False, layout="constrained"
    )
    # One colour per sixteenth of all values, so that the basin stays visible next to the walls.
    values = np.array(list(grids.values()))
    levels = np.unique(np.round(np.quantile(values, np.linspace(0, 1, 17)), 6))
    shades = BoundaryNorm(levels, 256)
    drawn = None
    for place, (method, grid) in zip(axes[0], grids.items(), strict=False):
        surface = np.array(grid).T
        drawn = place.contourf(ends, ends, surface, levels=levels, cmap="viridis", norm=shades)
        place.plot(0, 0, "w*", markeredgecolor="black", label="trained weights")
        place.set(title=method, xlabel=f"first {axis}", ylabel=f"second {axis}")
        place.legend(fontsize=8, loc="upper right")
    figure.colorbar(drawn, ax=axes[0][count - 1], label="mean training loss", format="%.3g")
    cut = axes[0][count]
    for i, (method, grid) in enumerate(grids.items()):
        middle = np.array(grid)[:, len(ends) // 2]
        cut.plot(ends, middle - middle[len(ends) // 2], color=COLOURS[i], label=method)
    cut.set(title="cut along the first", xlabel=f"first {axis}", ylabel="increase of the loss")
    cut.grid(alpha=0.3)
    cut.legend(fontsize=8)
    figure.suptitle(title)
    save(figure, out / f"{name}.png")


def _runs(name: str, options: argparse.Namespace, arguments: Sequence[str]) -> list[Run]:
    """Return one run per method, after checking that each has a single landscape."""
    if len(options.seeds) > 1:
        seeds = " ".join(str(seed) for seed in options.seeds)
        raise ValueError(
            f"--seeds must be a single seed: a landscape belongs to one run. Received: {seeds}."
        )
    runs = recipe_runs(options, [options.model], [options.data], options.methods, arguments)
    if name == "fig8" and runs[0].rho == 0:
        raise ValueError("--rho must be > 0: it is the unit of the axes. Received: 0.")
    return runs


def _figure(name: str, arguments: Sequence[str]) -> None:
    """Train, evaluate the surroundings of the minima, write and draw."""
    small = {"points": 11, "samples": 250, "groups": 2, "epochs": 5}
    options = parse(
        name,
        __doc__,
        arguments,
        add=_add,
        quick=small,
        check=lambda o: _runs(name, o, arguments),
    )
    x, y = _images(options)
    random = name == "fig4"
    reach = options.reach or (0.5 if random else 3.0)
    ends = torch.linspace(
        -reach, reach, options.points | 1
    )  # odd, so that the middle is the minimum
    grids: dict[str, Any] = {}
    rows = []
    for run in _runs(name, options, arguments):
        trainer = _load_or_train(run, options)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        total: Any = 0.0
        groups = options.groups if random else 1
        for group in range(groups):
            generator = torch.Generator().manual_seed(group)  # the same draws for each method
            if random:
                directions = [filter_normalised_direction(parameters, generator) for _ in range(2)]
            else:
                directions = _adversarial(trainer, x, y, run.rho)
            total = total + np.array(_grid(trainer, directions, ends, x, y)) / groups
        title = trainer.method.title
        grids[title] = total.tolist()
        middle = len(ends) // 2
        rise = total - total[middle, middle]
        rows.append(
            [title, f"{total[middle, middle]:.4f}", f"{rise.mean():.4f}", f"{rise.max():.4f}"]
        )
    what = "random, filter-normalised directions" if random else "half-batch adversarial directions"
    title = f"Figure {name[3:]}: loss around the minima, {what}, {options.data}"
    columns = ("method", "loss at the minimum", "mean rise", "largest rise")
    write_tables(options.out, name, title, columns, rows)
    found = {"title": title, "ends": ends.tolist(), "grids": grids, "rows": rows}
    write_json(options.out / f"{name}.json", {**found, **provenance()})
    axis = "direction" if random else "direction, in units of rho"
    _draw(name, title, axis, grids, ends, options.out)


def fig4(arguments: Sequence[str] = ()) -> None:
    """Random directions."""
    _figure("fig4", arguments)


def fig8(arguments: Sequence[str] = ()) -> None:
    """Adversarial directions."""
    _figure("fig8", arguments)
