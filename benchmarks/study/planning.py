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
from benchmarks.study.settings import Cell, Setting

__all__ = ["Plan", "Tuning", "finals_by_key", "make_plan", "tune"]

#: The number of cells that also run on the other tuning seeds.
CONFIRMED = 4


@dataclass(frozen=True)
class Tuning:
    """The state of a method's tuning at a budget.

    Args:
        missing: the runs to make next; empty when tuning is done, and as long as it waits for the
            tuning at the main budget.
        chosen: the best cell; None until tuning is done.
    """

    missing: tuple[Run, ...] = ()
    chosen: Cell | None = None


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


def tune(setting: Setting, method: str, budget: int, finals: Mapping[str, float]) -> Tuning:
    """Return the state of a method's tuning at a budget.

    Args:
        setting: the setting.
        method: the method.
        budget: the budget.
        finals: final accuracies, by the keys of the runs.
    """
    asked = _starts(setting, method, budget, finals)
    if not asked or not setting.tuning_seeds:
        return Tuning(chosen=asked[0] if asked else None)

    def run(cell: Cell, seed: int) -> Run:
        return setting.run(method, cell, budget, seed)

    def final(cell: Cell, seed: int) -> float | None:
        return finals.get(run(cell, seed).key(FIT))

    first, *others = setting.tuning_seeds
    found: dict[Cell, float] = {}
    while asked:
        missing = [run(cell, first) for cell in asked if final(cell, first) is None]
        if missing:
            return Tuning(tuple(missing))
        found |= {cell: final(cell, first) or 0.0 for cell in asked}
        asked = [cell for cell in _best(found, 1)[0].neighbours() if cell not in found]
    best = _best(found, CONFIRMED)
    missing = [run(cell, seed) for seed in others for cell in best if final(cell, seed) is None]
    if missing:
        return Tuning(tuple(missing))
    confirmed = [cell for cell in found if cell in best]  # in the order in which they were tried
    means = {c: mean(final(c, seed) or 0.0 for seed in setting.tuning_seeds) for c in confirmed}
    return Tuning(chosen=_best(means, 1)[0])


def _starts(setting: Setting, method: str, budget: int, finals: Mapping[str, float]) -> list[Cell]:
    """Return the start cells; none as long as they depend on unfinished tuning."""
    if budget == setting.main:
        return list(setting.starts[method])
    given = setting.restarts.get(budget, {}).get(method)
    if given is not None:
        return list(given)
    chosen = tune(setting, method, setting.main, finals).chosen
    return [] if chosen is None else [chosen]


def _best(values: Mapping[Cell, float], count: int) -> list[Cell]:
    """Return the cells with the highest values; of equal cells, the first tried comes first."""
    return sorted(values, key=lambda cell: -values[cell])[:count]  # sorting is stable


def make_plan(setting: Setting, records: Iterable[Mapping[str, Any]]) -> Plan:
    """Return the runs that a setting needs, in the order of the protocol.

    The contenders come first, at the main budget and then at the others; then the other methods.
    The reported runs of tuned methods come before the tuning of other methods, and are ordered by
    seed, so that the methods that are compared have equally many.

    Args:
        setting: the setting.
        records: the records of the finished runs.
    """
    finals = finals_by_key(records)
    ordered: list[tuple[tuple[int, ...], Run]] = []
    reported = list(setting.also)
    for place, (method, budget) in enumerate(setting.points()):
        tuning = tune(setting, method, budget, finals)
        stage = setting.stage(method, budget)
        ordered += [((*stage, 1, place), run) for run in tuning.missing]
        if tuning.chosen is not None:
            reported.append((method, budget, tuning.chosen))
    for place, (method, budget, cell) in enumerate(dict.fromkeys(reported)):
        for seed in setting.seeds:
            run = setting.run(method, cell, budget, seed)
            if run.key(FIT) not in finals:
                ordered.append(((*setting.stage(method, budget), 0, seed, place), run))
    return Plan(tuple(run for _, run in sorted(ordered, key=lambda entry: entry[0])))
