"""Which runs a setting still needs, in the order of the protocol, from those that are done.

Tuning depends on its own results: the climb goes on from the best cell so far. So the plan is made
anew from the records each time; it depends on them alone, and on nothing else that has happened.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from statistics import mean
from typing import Any

from benchmarks.run import Run
from benchmarks.store import key_of
from benchmarks.study.fit import FIT
from benchmarks.study.settings import Cell, Setting

__all__ = ["Plan", "Tuning", "finals_by_key", "make_plan", "reported_runs", "tune"]

#: Cells that are confirmed on the other tuning seeds, for the first and for the second batch size.
CONFIRMED, CONFIRMED_SECOND = 4, 2


@dataclass(frozen=True)
class Tuning:
    """Where a method's tuning stands.

    Args:
        missing: runs to make now; none once the tuning is done.
        chosen: its cell for its best batch size, and for its second; empty until it is done.
    """

    missing: tuple[Run, ...]
    chosen: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a setting needs.

    Args:
        runs: that can be made now, the most decisive first.
        done: whether nothing is missing any more.
    """

    runs: tuple[Run, ...]
    done: bool


def finals_by_key(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the final accuracies by the keys of their runs."""
    return {key_of(record): record["final"] for record in records}


def tune(setting: Setting, method: str, finals: Mapping[str, float]) -> Tuning:
    """Return where the tuning of a method stands.

    Args:
        setting: where.
        method: which.
        finals: final accuracies by key.
    """

    def run(cell: Cell, seed: int) -> Run:
        return setting.run(method, cell, setting.tuned_at, seed)

    def final(cell: Cell, seed: int) -> float | None:
        return finals.get(run(cell, seed).key(FIT))

    first, *others = setting.tuning_seeds
    found: dict[Cell, float] = {}
    asked = list(setting.starts[method])
    while asked:
        missing = [run(cell, first) for cell in asked if final(cell, first) is None]
        if missing:
            return Tuning(tuple(missing))
        found |= {cell: final(cell, first) or 0.0 for cell in asked}
        asked = [cell for cell in _best(found, 1)[0].neighbours() if cell not in found]

    def confirmed(candidates: Mapping[Cell, float], count: int) -> Cell | list[Run]:
        """Return the best of some cells by all tuning seeds, or the runs that are missing."""
        best = _best(candidates, count)
        missing = [run(c, seed) for seed in others for c in best if final(c, seed) is None]
        if missing:
            return missing
        means = {c: mean(final(c, seed) or 0.0 for seed in setting.tuning_seeds) for c in best}
        return _best(means, 1)[0]

    chosen = confirmed(found, CONFIRMED)
    if isinstance(chosen, list):
        return Tuning(tuple(chosen))
    rest = {cell: value for cell, value in found.items() if cell.batch != chosen.batch}
    if not rest:
        return Tuning((), (chosen,))
    second = confirmed(rest, CONFIRMED_SECOND)
    if isinstance(second, list):
        return Tuning(tuple(second))
    return Tuning((), (chosen, second))


def _best(values: Mapping[Cell, float], count: int) -> list[Cell]:
    """Return the cells with the highest values; among equals, the one that was tried first."""
    return sorted(values, key=lambda cell: -values[cell])[:count]  # a stable order


def reported_runs(setting: Setting, method: str, cell: Cell) -> list[Run]:
    """Return the reported runs of a method's cell: the tuned budget first, seed by seed."""
    budgets = sorted(setting.budgets, key=lambda budget: budget != setting.tuned_at)
    return [setting.run(method, cell, b, seed) for b in budgets for seed in setting.seeds]


def make_plan(setting: Setting, records: Iterable[Mapping[str, Any]]) -> Plan:
    """Return what a setting needs: the tuning first, then the reported runs.

    Reported are the chosen cells of all methods at the tuned budget, seed by seed, then at the
    other budgets, then the same for the second batch sizes.

    Args:
        setting: which.
        records: of the runs that are done.
    """
    finals = finals_by_key(records)
    tunings = {method: tune(setting, method, finals) for method in setting.methods}
    tuning = list(chain.from_iterable(t.missing for t in tunings.values()))
    reported: list[Run] = []
    for place in (0, 1):
        each = [
            reported_runs(setting, method, t.chosen[place])
            for method, t in tunings.items()
            if len(t.chosen) > place
        ]
        reported += chain.from_iterable(zip(*each, strict=True))
    missing = [run for run in reported if run.key(FIT) not in finals]
    return Plan((*tuning, *missing), not tuning and not missing)
