"""The figures of a setting, and the names of its methods."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from benchmarks.figures import COLOURS, MARKERS, plt, save
from benchmarks.study.analysis import Point, corrected_ps, difference_from_frontier, interval
from benchmarks.study.settings import Cell, Setting

__all__ = ["cell_text", "draw_differences", "draw_frontier", "titles_of"]


#: The fewest seeds of a point in the figure of accuracy against compute.
_FEWEST_SEEDS = 3


def titles_of(setting: Setting) -> dict[str, str]:
    """Return the methods' names in tables."""
    return {
        "sgd": setting.base,
        "sgd-ema": f"{setting.base}, averaged weights",
        "sam": "SAM",
        "half-suffix": "Suffix(0.5), Proportional(0.5)",
        "part": "Part(0.25)",
        "suffix-part": "Suffix(0.5), Part(0.25)",
        "part-random": "Part(0.5), Random(0.5)",
        "previous": "Previous()",
        "momentum": "Momentum()",
        "esam": "the paper's ESAM",
    }


def cell_text(method: str, cell: Cell) -> str:
    """Return a cell's values as text."""
    strength = f", {'share' if method == 'sgd-ema' else 'rho'} {cell.strength:g}"
    return f"batch {cell.batch}, lr {cell.lr:g}{strength if cell.strength else ''}"


def draw_differences(path: Path, setting: Setting, points: Sequence[Point], *, done: bool) -> None:
    """Draw each method's difference from the base optimizer's best at the main budget.

    Differences that are certain after Holm's correction have a colour.

    Args:
        path: of the figure; not written without such differences.
        setting: the setting.
        points: all points of the setting.
        done: whether all runs have been made.
    """
    titles, rows = titles_of(setting), []
    for point in points:
        if not point.chosen or point.budget != setting.main:
            continue
        found = difference_from_frontier(points, point, "sgd")
        if found is not None:
            rows.append((found, point.method))
    if not rows:
        return
    rows.sort(key=lambda row: row[0].mean)
    ps = corrected_ps(setting, points, "sgd")
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * len(rows)))
    for place, (found, method) in enumerate(rows):
        colour = COLOURS[2] if found.mean > 0.0 else COLOURS[1]
        axes.errorbar(
            found.mean,
            place,
            xerr=found.half if isfinite(found.half) else 0.0,
            fmt="o",
            color=colour if ps.get(method, 1.0) < 0.05 else "0.5",
            capsize=4,
            markersize=8,
        )
    axes.axvline(0.0, color="black", linewidth=1)
    names = [f"{titles[method]} ({found.seeds} seeds)" for found, method in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"points of test accuracy over {setting.base} for the same compute")
    axes.set_title(f"{setting.title}{'' if done else ' (interim)'}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def draw_frontier(path: Path, setting: Setting, points: Sequence[Point], *, done: bool) -> None:
    """Draw mean final accuracy against compute, one line per method.

    Points of fewer than three seeds are left out: their intervals would be larger than the figure.
    """
    titles = titles_of(setting)
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, method in enumerate(setting.methods):
        line = [p for p in points if p.chosen and p.method == method]
        line = [p for p in line if len(p.finals) >= min(_FEWEST_SEEDS, len(setting.seeds))]
        if not line:
            continue
        line.sort(key=lambda p: p.compute)
        halves = [interval(list(p.finals.values())) for p in line]
        # So that the intervals can be told apart.
        aside = 1.0 + 0.008 * (i - len(setting.methods) // 2)
        axes.errorbar(
            [aside * p.compute for p in line],
            [p.mean for p in line],
            yerr=[h if isfinite(h) else 0.0 for h in halves],
            fmt=MARKERS[i],
            linestyle="-",
            color=COLOURS[i],
            capsize=3,
            label=titles[method],
        )
    axes.set_xscale("log", base=2)
    budgets = sorted({*setting.budgets, *setting.base_budgets})
    axes.set_xlim(0.8 * min(budgets), 1.25 * max(budgets))
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set(
        xlabel=f"compute (epochs of {setting.base})",
        ylabel="final test accuracy (%), 95 % interval",
    )
    axes.set_title(f"{setting.title}{'' if done else ' (interim)'}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path)
