"""The figures of a setting, and the names of its methods."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from benchmarks.figures import COLOURS, MARKERS, plt, save
from benchmarks.study.analysis import (
    Point,
    corrected_ps,
    difference_from_frontier,
    frontier,
    interval,
)
from benchmarks.study.rules import FRONTIERS, SIGNIFICANT, is_settled
from benchmarks.study.settings import CONTENDERS, Cell, Setting

__all__ = ["best_so_far", "cell_text", "draw_differences", "draw_frontier", "titles_of"]


#: The fewest seeds of a point in the figure of accuracy against compute.
_FEWEST_SEEDS = 3


#: What the methods do, for the figures; the others are known by their names.
_WORDS = {
    "half-suffix": "half of the network, descent on half of the batch",
    "part": "SAM, ascent on a quarter of the batch",
    "suffix-part": "half of the network, ascent on a quarter of the batch",
    "part-random": "SAM on a random half of each batch",
    "previous": "ascent along the previous gradient",
    "momentum": "perturbation along the momentum",
}


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


def _seeds_text(setting: Setting, counts: Sequence[int], *, settled: bool) -> str:
    """Return the numbers of seeds of what a figure shows, for its title."""
    fewest, most = min(counts), max(counts)
    some = f"{fewest} to {most}" if fewest < most else f"{most}"
    of = "" if fewest == len(setting.seeds) else f" of {len(setting.seeds)}"
    return f"{some}{of} seeds{'' if settled else '; interim: some runs are missing'}"


def _label(setting: Setting, method: str, epochs: int) -> str:
    """Return a method's name in a figure: what it does, then its name and epochs."""
    title, words = titles_of(setting)[method], _WORDS.get(method)
    end = f"{title}, {epochs} epochs"
    return end if words is None else f"{words}\n{end}"


def draw_differences(path: Path, setting: Setting, points: Sequence[Point]) -> None:
    """Draw each method's difference from the base optimizer's best at the main budget.

    Differences that are certain after Holm's correction have a colour. The base optimizer's own
    runs, which are not tested, are hollow.

    Args:
        path: of the figure; not written without such differences.
        setting: the setting.
        points: all points of the setting.
    """
    rows = []
    for point in points:
        if not point.chosen or point.budget != setting.main:
            continue
        found = difference_from_frontier(points, point, "sgd")
        if found is not None:
            rows.append((found, point))
    best = frontier(points, "sgd", setting.main)
    if not rows or best is None:
        return
    rows.sort(key=lambda row: row[0].mean)
    ps = corrected_ps(setting, points, "sgd")
    figure, axes = plt.subplots(figsize=(7, 1.3 + 0.5 * len(rows)))
    for place, (found, point) in enumerate(rows):
        colour, p = COLOURS[2] if found.mean > 0.0 else COLOURS[1], ps.get(point.method)
        if p is None or p >= SIGNIFICANT:
            colour = "black" if p is None else "0.5"
        axes.errorbar(
            found.mean,
            place,
            xerr=found.half if isfinite(found.half) else 0.0,
            fmt="o",
            color=colour,
            markerfacecolor="white" if p is None else colour,
            capsize=4,
            markersize=8,
        )
    axes.axvline(0.0, color="black", linewidth=1)
    labels = [_label(setting, p.method, setting.epochs(p.method, p.budget)) for _, p in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    epochs = setting.epochs("sgd", best.budget)
    axes.set_xlabel(
        f"points of test accuracy above {setting.base}'s best ({epochs} epochs), 95 % interval; "
        "grey: not significant"
        + ("; hollow: not tested" if any(p.method not in ps for _, p in rows) else "")
    )
    settled = is_settled(setting, points, setting.main, setting.methods)
    seeds = _seeds_text(setting, [found.seeds for found, _ in rows], settled=settled)
    axes.set_title(
        f"{setting.words}\nthe compute of {setting.main} epochs of {setting.base}; {seeds}",
        fontsize=10,
    )
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def _line(setting: Setting, points: Sequence[Point], method: str) -> list[Point]:
    """Return a method's points in the figure of accuracy against compute, by compute.

    For the two frontiers, these are the best at each budget, otherwise the chosen ones.
    """
    least = min(_FEWEST_SEEDS, len(setting.seeds))
    own = [p for p in points if p.method == method and len(p.finals) >= least]
    if method not in FRONTIERS:
        return sorted((p for p in own if p.chosen), key=lambda p: p.compute)
    budgets = sorted({p.budget for p in own})
    at_each = ([p for p in own if p.budget == budget] for budget in budgets)
    return [max(here, key=lambda p: (len(p.finals), p.mean)) for here in at_each]


def best_so_far(points: Sequence[Point], line: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Return the points of a frontier with dearer and worse ones, and the last of these.

    Args:
        points: all points of the setting.
        line: the best points of the frontier's method at each budget, by compute.
    """
    last: dict[int, tuple[Point, Point]] = {}
    for dear in line:
        best = frontier(points, dear.method, dear.compute)
        if best is not None and best.mean > dear.mean:
            last[best.budget] = (best, dear)
    return list(last.values())


def draw_frontier(path: Path, setting: Setting, points: Sequence[Point]) -> None:
    """Draw mean final accuracy against compute for the contenders.

    For the two frontiers, also their best so far where it is more than what the budget gives.
    Points of fewer than three seeds are left out: their intervals would be larger than the figure.
    Nothing is written without any others.
    """
    lines = {method: _line(setting, points, method) for method in CONTENDERS}
    drawn = [p for line in lines.values() for p in line]
    if not drawn:
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, (method, line) in enumerate(lines.items()):
        if not line:
            continue
        name, words = titles_of(setting)[method], _WORDS.get(method)
        _draw_line(axes, setting, i, line, name if words is None else f"{name}: {words}")
        for best, dear in best_so_far(points, line) if method in FRONTIERS else ():
            ends = [best.compute, dear.compute]
            axes.plot(ends, 2 * [best.mean], "--", color=COLOURS[i], label=f"{name}'s best so far")
    axes.set_xscale("log", base=2)
    budgets = sorted({*setting.budgets, *setting.base_budgets})
    axes.set_xlim(0.8 * min(budgets), 1.25 * max(budgets))
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set(
        xlabel=f"compute (epochs of {setting.base})",
        ylabel="final test accuracy (%), 95 % interval",
    )
    settled = all(is_settled(setting, points, b, CONTENDERS) for b in setting.budgets)
    counts, most = [len(p.finals) for p in drawn], len(setting.seeds)
    seeds = _seeds_text(setting, counts, settled=settled)
    hollow = f"; hollow: fewer than {most}" if min(counts) < most else ""
    best = f"; tuned at each compute ({setting.base} and SAM: their best configuration)"
    tuned = best if setting.tuning_seeds else ""
    axes.set_title(f"{setting.words}\n{seeds}{hollow}{tuned}", fontsize=10)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    axes.grid(alpha=0.3)
    save(figure, path)


def _draw_line(axes: Any, setting: Setting, i: int, line: Sequence[Point], label: str) -> None:
    """Draw the points of a contender; those with missing seeds are hollow."""
    aside = 1.0 + 0.01 * (i - 1)  # so that the intervals can be told apart
    axes.plot(
        [aside * p.compute for p in line],
        [p.mean for p in line],
        color=COLOURS[i],
        marker=MARKERS[i],
        label=label,
    )
    for p in line:
        half = interval(list(p.finals.values()))
        axes.errorbar(
            aside * p.compute,
            p.mean,
            yerr=half if isfinite(half) else 0.0,
            fmt=MARKERS[i],
            color=COLOURS[i],
            markerfacecolor=COLOURS[i] if len(p.finals) == len(setting.seeds) else "white",
            capsize=3,
        )
