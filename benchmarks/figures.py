"""Figures with labelled axes and a legend."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files, not windows

from matplotlib import pyplot as plt

__all__ = ["curves", "panels", "save", "scatter"]

#: Colours for all kinds of colour vision (Okabe and Ito), then shades of them.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1"),
    *("#005080", "#8F3F00", "#00664A", "#8A4F70", "#9C6B00", "#2B7BA8", "#777777", "#4D3B80"),
)
MARKERS = "osD^v<>pP*XhH8d."


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def scatter(
    path: Path,
    *,
    title: str,
    x: tuple[str, Sequence[float]],
    y: tuple[str, Sequence[float]],
    labels: Sequence[str],
    spread: Sequence[tuple[float, float]] | None = None,
    diagonal: str | None = None,
    named: Collection[str] | None = None,
) -> None:
    """Draw one marker per label, numbered, since many colours are hard to distinguish.

    Args:
        path: the path of the PNG.
        title: the title.
        x: label and values of the x axis.
        y: label and values of the y axis.
        labels: one label per point, for the legend.
        spread: lower and upper ends of y.
        diagonal: label of the line x = y in the legend; None draws no line.
        named: the labels to show; the other points are grey dots. None shows all.
    """
    figure, axes = plt.subplots(figsize=(8.5, 5))
    others = [i for i, label in enumerate(labels) if named is not None and label not in named]
    if others:
        axes.plot(
            [x[1][i] for i in others],
            [y[1][i] for i in others],
            "o",
            color="0.7",
            markersize=5,
            label=f"{len(others)} other method{'s' if len(others) > 1 else ''}",
        )
    shown = [i for i in range(len(labels)) if i not in others]
    for i, at in enumerate(shown):
        error = None
        if spread is not None:
            low, high = spread[at]
            error = [[max(0.0, y[1][at] - low)], [max(0.0, high - y[1][at])]]
        axes.errorbar(
            x[1][at],
            y[1][at],
            yerr=error,
            fmt=MARKERS[
                (i + i // len(MARKERS)) % len(MARKERS)
            ],  # with a different colour in each round
            color=COLOURS[i % len(COLOURS)],
            label=f"{i + 1}  {labels[at]}",
            capsize=3,
        )
        axes.annotate(
            str(i + 1),
            (x[1][at], y[1][at]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=9,
        )
    if diagonal is not None:
        ends = [min(x[1]), max(x[1])]
        axes.plot(ends, ends, "--", color="#999999", label=diagonal, zorder=0)
    axes.set(title=title, xlabel=x[0], ylabel=y[0])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    save(figure, path)


def curves(
    path: Path,
    *,
    title: str,
    x: tuple[str, Sequence[float]],
    y: str,
    lines: Mapping[str, Sequence[float]],
    log: bool = False,
) -> None:
    """Draw one line for each name.

    Args:
        path: the path of the PNG.
        title: the title.
        x: label and values of the x axis.
        y: label of the y axis.
        lines: values by name.
        log: whether y is logarithmic.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5))
    draw_curves(axes, title=title, x=x, y=y, lines=lines, log=log)
    save(figure, path)


def draw_curves(
    axes: Any,
    *,
    title: str,
    x: tuple[str, Sequence[float]],
    y: str,
    lines: Mapping[str, Sequence[float]],
    log: bool = False,
) -> None:
    """Draw one line for each name into the given axes."""
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(
            x[1],
            values,
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
    axes.set(title=title, xlabel=x[0], ylabel=y)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def panels(count: int, width: float = 5.0, height: float = 4.2) -> tuple[Any, Sequence[Any]]:
    """Return a figure with `count` axes side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, list(axes[0])
