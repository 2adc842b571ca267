"""What the rules of docs/study-protocol.md say about a setting, and whether it can still change."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.study.analysis import (
    Difference,
    Point,
    corrected_ps,
    difference_from_frontier,
)
from benchmarks.study.settings import Setting

__all__ = ["FRONTIERS", "Verdict", "is_settled", "verdicts"]

#: The methods that the others are compared with.
FRONTIERS = ("sgd", "sam")

#: Corrected p values below this one are significant.
SIGNIFICANT = 0.05


def is_settled(
    setting: Setting,
    points: Sequence[Point],
    budget: int,
    methods: Collection[str],
    frontiers: Collection[str] = FRONTIERS,
) -> bool:
    """Return whether all runs have been made that a comparison at a budget depends on.

    Args:
        setting: the setting.
        points: all its points.
        budget: the budget.
        methods: the methods that are compared.
        frontiers: the methods that they are compared with, at this and all smaller budgets.
    """
    full = [p for p in points if len(p.finals) == len(setting.seeds)]
    chosen = {(p.method, p.budget) for p in full if p.chosen}
    cells = {(p.method, p.budget, p.cell) for p in full}

    def matters(method: str, at: int) -> bool:
        return (method in methods and at == budget) or (method in frontiers and at <= budget)

    return all(entry in chosen for entry in setting.points() if matters(*entry)) and all(
        entry in cells for entry in setting.also if matters(*entry[:2])
    )


@dataclass(frozen=True)
class Verdict:
    """What the first rule says about a method at a budget.

    Args:
        differences: the differences from the frontiers, by the frontier's method; None without any.
        ps: their corrected p values, where they are corrected: at the main budget.
    """

    differences: Mapping[str, Difference | None]
    ps: Mapping[str, float]

    def is_above(self, frontier: str) -> bool:
        """Return whether the method is above a frontier: interval and corrected p value."""
        found = self.differences[frontier]
        significant = self.ps.get(frontier, 0.0) < SIGNIFICANT
        return found is not None and found.above and significant

    @property
    def counts(self) -> bool:
        """Whether the method is above both frontiers."""
        return all(self.is_above(name) for name in FRONTIERS)


def verdicts(setting: Setting, points: Sequence[Point], budget: int) -> dict[str, Verdict]:
    """Return what the first rule says about the compared methods at a budget.

    The second rule uses the same differences: that from SGD's frontier must not be entirely below
    0 at any budget.

    Args:
        setting: the setting.
        points: all its points.
        budget: a budget; only at the main one are p values corrected.
    """
    corrected = {
        name: corrected_ps(setting, points, name) if budget == setting.main else {}
        for name in FRONTIERS
    }
    return {
        point.method: Verdict(
            {name: difference_from_frontier(points, point, name) for name in FRONTIERS},
            {name: ps[point.method] for name, ps in corrected.items() if point.method in ps},
        )
        for point in points
        if point.chosen and point.budget == budget and point.method not in FRONTIERS
    }
