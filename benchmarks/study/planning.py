"""The runs that a setting still needs, in the order of the protocol.

Tuning depends on its own results: it continues from the best cell so far. The plan is therefore
computed again after each run, and only from the records.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.run import Run
from benchmarks.store import key_of
from benchmarks.study.fit import FIT
from benchmarks.study.settings import CONTENDERS, Cell, Setting

__all__ = ["Plan", "Tuning", "finals_by_key", "make_plan", "tune"]

#: Numbers of cells that also run on the other tuning seeds, for the first and second batch size.
CONFIRMED, CONFIRMED_SECOND = 4, 2


@dataclass(frozen=True)
class Tuning:
    """The state of a method's tuning.

    Args:
        missing: the runs to make next; empty when tuning is done.
        chosen: the cells of the best and, unless only that is reported, of the second batch size;
            empty until tuning is done.
    """

    missing: tuple[Run, ...]
    chosen: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The runs that a setting needs.

    Args:
        runs: the runs that can be made now, the most important first.
    """

    runs: tuple[Run, ...]

    @property
    def done(self) -> bool:
        """Whether all runs have been made."""
        return not self.runs


def finals_by_key(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the final accuracy of each run, by the run's key."""
    return {key_of(record): record["final"] for record in records}


def tune(setting: Setting, method: str, finals: Mapping[str, float]) -> Tuning:
    """Return the state of a method's tuning.

    Args:
        setting: the setting.
        method: the method.
        finals: final accuracies, by the keys of the runs.
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

    def confirm(candidates: Mapping[Cell, float], count: int) -> Cell | list[Run]:
        """Return the best cell by the mean of all tuning seeds, or the missing runs."""
        best = _best(candidates, count)
        missing = [run(c, seed) for seed in others for c in best if final(c, seed) is None]
        if missing:
            return missing
        means = {c: mean(final(c, seed) or 0.0 for seed in setting.tuning_seeds) for c in best}
        return _best(means, 1)[0]

    chosen = confirm(found, CONFIRMED)
    if isinstance(chosen, list):
        return Tuning(tuple(chosen))
    rest = {cell: value for cell, value in found.items() if cell.batch != chosen.batch}
    if not rest or method not in setting.two_sizes:
        return Tuning((), (chosen,))
    second = confirm(rest, CONFIRMED_SECOND)
    if isinstance(second, list):
        return Tuning(tuple(second))
    return Tuning((), (chosen, second))


def _best(values: Mapping[Cell, float], count: int) -> list[Cell]:
    """Return the cells with the highest values; of equal cells, the first tried comes first."""
    return sorted(values, key=lambda cell: -values[cell])[:count]  # sorting is stable


def make_plan(setting: Setting, records: Iterable[Mapping[str, Any]]) -> Plan:
    """Return the runs that a setting needs, in the order of the protocol.

    First come the reported runs at the tuned budget of all methods that are tuned, and those of the
    contenders at smaller budgets; then the tuning of the other methods; then the other budgets and
    the second batch sizes, each with the contenders first. Reported runs are ordered by seed, so
    that the methods that are compared have equally many.

    Args:
        setting: the setting.
        records: the records of the finished runs.
    """
    finals = finals_by_key(records)
    ordered: list[tuple[tuple[int, ...], Run]] = []
    for place, method in enumerate(setting.methods):
        tuning = tune(setting, method, finals)
        ordered += [((2, place), run) for run in tuning.missing]
        for second, cell in enumerate(tuning.chosen):
            for budget in setting.budgets:
                order = _order(setting, method, budget, second=bool(second))
                for seed in setting.seeds:
                    run = setting.run(method, cell, budget, seed)
                    if run.key(FIT) not in finals:
                        ordered.append(((*order, seed, place), run))
    return Plan(tuple(run for _, run in sorted(ordered, key=lambda entry: entry[0])))


def _order(setting: Setting, method: str, budget: int, *, second: bool) -> tuple[int, ...]:
    """Return the place of a point's reported runs in the plan; tuning has the place (2,)."""
    other = method not in CONTENDERS
    if second:
        return (4, other, budget != setting.tuned_at, budget)
    if budget == setting.tuned_at:
        return (0,)
    if budget < setting.tuned_at and not other:
        return (1, budget)
    return (3, other, budget)
