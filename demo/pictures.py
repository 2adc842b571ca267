"""The demo's pictures: loss curves, and the landscapes around the minima."""

import copy
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from benchmarks.paper.landscape import filter_normalised_direction
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from esam_torch import History

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw_curves", "draw_landscapes", "landscape"]

COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#009E73")  # SGD, SAM, ESAM, and the last
#: The range of the landscapes, in norms of the network's filters.
REACH = 0.6
POINTS = 17


def landscape(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> NDArray[np.float64]:
    """Return the (POINTS, POINTS) mean losses on a plane around the weights.

    The plane is spanned by two random directions, filter-normalised as in Li et al. (2018), with
    the same seed for all methods.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model).eval()
    parameters = list(moved.parameters())
    origin = [p.detach().clone() for p in parameters]
    first, second = (filter_normalised_direction(parameters, generator) for _ in range(2))
    ends = np.linspace(-REACH, REACH, POINTS)
    values = np.empty((POINTS, POINTS))
    with torch.no_grad():
        for i, a in enumerate(ends):
            for j, b in enumerate(ends):
                rows = zip(parameters, origin, first, second, strict=True)
                for parameter, start, one, other in rows:
                    parameter.copy_(start + float(a) * one + float(b) * other)
                values[i, j] = float(F.cross_entropy(moved(x), y))
    return values


def draw_landscapes(grids: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    """Draw the minima side by side, with the same axes and colours."""
    figure, axes = plt.subplots(
        1, len(grids), figsize=(3.4 * len(grids) + 0.9, 3.7), sharey=True, layout="constrained"
    )
    ends = np.linspace(-REACH, REACH, POINTS)
    low = min(grid.min() for grid in grids.values())
    high = max(grid.max() for grid in grids.values())
    levels = np.geomspace(max(low, 1e-4), high, 24)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        shown = axis.contourf(
            ends,
            ends,
            np.maximum(grid.T, levels[0]),
            levels,
            norm=mpl.colors.LogNorm(levels[0], levels[-1]),
            cmap="viridis",
        )
        axis.contour(ends, ends, grid.T, levels[::3], colors="white", linewidths=0.4)
        axis.plot(0, 0, "+", color="white", markersize=9)
        axis.set(title=name, xlabel="direction 1 / filter norm", aspect="equal")
    axes[0].set_ylabel("direction 2 / filter norm")
    bar = figure.colorbar(shown, ax=axes, label="mean training loss", shrink=0.85)
    # Only levels inside the bar, as plain numbers.
    digits = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 1.5, 2, 3, 5, 7)]
    inside = [tick for tick in digits if low <= tick <= high]
    ticks = inside[:: max(1, -(-len(inside) // 8))]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    figure.suptitle("Training loss around the final weights (+), in the same two random directions")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(histories: Mapping[str, History], path: Path) -> None:
    """Draw training loss and test error by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for (name, history), colour in zip(histories.items(), COLOURS, strict=True):
        epochs = history["epoch"]
        marker = "o" if len(epochs) < 5 else None  # a line needs two epochs
        left.plot(epochs, history["train_loss"], color=colour, marker=marker, label=name)
        error = [100 * (1 - value) for value in history["eval_accuracy"]]
        right.plot(epochs, error, color=colour, marker=marker, label=name)
    left.set(xlabel="epoch", ylabel="mean training loss", yscale="log", title="Training loss")
    right.set(xlabel="epoch", ylabel="test error (%)", yscale="log", title="Test error")
    left.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    left.yaxis.set_minor_formatter(mpl.ticker.LogFormatter())
    right.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    right.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    right.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    for axis in (left, right):
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, min_n_ticks=1))
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
