"""The study's tuning: start cells, neighbours, confirmation, and further budgets and cells."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.run import Run
from benchmarks.store import Store
from benchmarks.study.fit import FIT
from benchmarks.study.planning import Tuning, finals_by_key, make_plan, tune
from benchmarks.study.settings import QUICK, SETTINGS, Cell

SMALL = SETTINGS["small"]
ROOT = Path(__file__).parents[2]


def _record(run: Run, final: float) -> dict[str, Any]:
    return {"run": dataclasses.asdict(run), "probe": FIT, "final": final}


def _tuned(
    method: str, accuracy: Callable[[Run], float], budget: int = SMALL.main
) -> tuple[Cell | None, list[Run]]:
    """Return the cell chosen by tuning on runs with known accuracies, and all tuning runs."""
    finals: dict[str, float] = {}
    made: list[Run] = []
    while True:
        tuning = tune(SMALL, method, budget, finals)
        if not tuning.missing:
            return tuning.chosen, made
        made += tuning.missing
        finals |= {run.key(FIT): accuracy(run) for run in tuning.missing}


def _distance(value: float, best: float) -> float:
    """Return the distance of a value from the best one, in factors of two."""
    return abs(math.log2(value / best))


def test_tuning_continues_beyond_the_first_cells_to_the_best() -> None:
    def accuracy(run: Run) -> float:
        off = _distance(run.lr, 0.0125) + _distance(run.batch, 128) + _distance(run.rho, 0.8)
        return 50.0 - off

    best, made = _tuned("sam", accuracy)
    assert best == Cell(128, 0.0125, 0.8)
    assert all(8 <= run.batch <= 128 for run in made)
    assert {run.epochs for run in made} == {10}  # at budget 20 SAM has half of SGD's epochs
    assert len({run.key(FIT) for run in made}) == len(made)


def test_tuning_starts_with_the_cells_of_the_protocol() -> None:
    def started(method: str) -> tuple[Run, ...]:
        return tune(SMALL, method, SMALL.main, {}).missing

    sgd = {(r.batch, r.lr) for r in started("sgd")}
    assert sgd == {(b, lr) for b in (16, 32, 64) for lr in (0.0125, 0.025, 0.05, 0.1, 0.2)}
    sam = {(r.batch, r.lr, r.rho) for r in started("sam")}
    assert {rho for batch, _, rho in sam if batch == 32} == {0.05, 0.1, 0.2}
    assert {lr for _, lr, _ in sam} == {0.05}
    for method in ("sgd-ema", "part", "previous", "esam"):
        assert {(r.batch, r.lr) for r in started(method)} == {(16, 0.05), (32, 0.05)}
    assert {r.ema for r in started("sgd-ema")} == {0.02}
    assert {r.effective_rho for r in started("momentum") if r.batch == 32} == {0.1, 0.4, 1.6}


def _chosen(name: str, method: str, budget: int) -> Cell | None:
    """Return the cell that tuning has chosen in the committed results."""
    records = Store(ROOT / f"benchmarks/results/study-{name}").records()
    return tune(SETTINGS[name], method, budget, finals_by_key(records)).chosen


@pytest.mark.parametrize("name", ["fresh", "noisy", "wide"])
def test_settings_start_from_the_cells_that_were_chosen_in_small(name: str) -> None:
    setting = SETTINGS[name]
    for method in setting.methods:
        first, *second = setting.starts[method]
        assert first == _chosen("small", method, SMALL.main)
        assert all(cell.batch != first.batch for cell in second)
    for budget, restarts in setting.restarts.items():
        for method, cells in restarts.items():
            tuned_in_small = budget in (*SMALL.budgets, *SMALL.base_budgets)
            chosen = (_chosen("small", method, budget),) if tuned_in_small else None
            assert cells == (chosen or setting.starts[method])


def test_a_setting_without_tuning_seeds_is_not_tuned() -> None:
    fresh = SETTINGS["fresh"]
    plan = make_plan(fresh, [])
    assert {run.seed for run in plan.runs} == set(fresh.seeds)
    reported = len(fresh.points()) + len(fresh.also)
    assert len(plan.runs) == reported * len(fresh.seeds)
    for method, budget in fresh.points():
        tuning = tune(fresh, method, budget, {})
        assert tuning.chosen == _chosen("small", method, budget)
        assert not tuning.missing


def test_other_budgets_are_tuned_from_the_cell_of_the_main_budget() -> None:
    def accuracy(run: Run) -> float:
        best = 0.1 if run.epochs == 10 else 0.4  # of SAM's ten epochs, and of twice as many
        return 50.0 - _distance(run.rho, best) - _distance(run.lr, 0.05) - _distance(run.batch, 32)

    finals: dict[str, float] = {}
    assert tune(SMALL, "sam", 40, finals) == Tuning()  # it waits for the main budget
    while missing := tune(SMALL, "sam", SMALL.main, finals).missing:
        finals |= {run.key(FIT): accuracy(run) for run in missing}
    assert tune(SMALL, "sam", SMALL.main, finals).chosen == Cell(32, 0.05, 0.1)
    (start,) = tune(SMALL, "sam", 40, finals).missing
    assert (start.batch, start.lr, start.rho, start.epochs) == (32, 0.05, 0.1, 20)
    while missing := tune(SMALL, "sam", 40, finals).missing:
        finals |= {run.key(FIT): accuracy(run) for run in missing}
    assert tune(SMALL, "sam", 40, finals).chosen == Cell(32, 0.05, 0.4)
    assert tune(SMALL, "sam", SMALL.main, finals).chosen == Cell(32, 0.05, 0.1)


def test_further_budgets_of_the_base_optimizer_are_tuned_and_reported_and_only_its_own() -> None:
    records: list[dict[str, Any]] = []
    setting = dataclasses.replace(QUICK, base_budgets=(1,))
    while not (plan := make_plan(setting, records)).done:
        records += [_record(run, 50.0 - _distance(run.batch, 32)) for run in plan.runs]
    short = [Run(**r["run"]) for r in records if r["run"]["epochs"] == 1]
    methods = [run.method for run in short if run.seed in setting.seeds]
    assert methods.count("sgd") == len(setting.seeds)
    assert set(methods) == {"sgd", "sam", "esam"}  # those with budget 2, of two epochs of SGD
    assert {run.seed for run in short} == {*setting.seeds, *setting.tuning_seeds}
    assert ("sgd", 1) in setting.points() and ("suffix-part", 1) not in setting.points()


def test_cells_can_be_reported_in_addition_to_the_chosen_ones() -> None:
    fresh = SETTINGS["fresh"]
    ((method, budget, cell),) = fresh.also
    runs = [fresh.run(method, cell, budget, seed) for seed in fresh.seeds]
    assert cell == _chosen("small", "sgd", SMALL.main)
    assert set(runs) <= set(make_plan(fresh, []).runs)
    assert not set(runs) & set(make_plan(fresh, [_record(run, 50.0) for run in runs]).runs)


def test_of_equal_cells_the_one_that_was_tried_first_is_chosen() -> None:
    cells = [Cell(run.batch, run.lr) for run in tune(SMALL, "sgd", SMALL.main, {}).missing]
    early, late = cells[3], cells[8]

    def accuracy(run: Run) -> float:
        cell = Cell(run.batch, run.lr)
        if cell == early:
            return 44.0 if run.seed == 100 else 45.0
        if cell == late:
            return 45.0 if run.seed == 100 else 44.0
        return 30.0

    assert _tuned("sgd", accuracy)[0] == early


def test_the_other_tuning_seeds_decide_between_the_best_cells() -> None:
    lucky, steady = Cell(32, 0.05), Cell(32, 0.1)

    def accuracy(run: Run) -> float:
        if (run.batch, run.lr) == (lucky.batch, lucky.lr):
            return 45.0 if run.seed == 100 else 40.0
        if (run.batch, run.lr) == (steady.batch, steady.lr):
            return 44.0
        return 43.0 - _distance(run.lr, 0.05) - _distance(run.batch, 32)

    chosen, made = _tuned("sgd", accuracy)
    assert chosen == steady
    confirmed = {(run.batch, run.lr) for run in made if run.seed != 100}
    assert {run.seed for run in made} == {100, 101}
    assert (lucky.batch, lucky.lr) in confirmed
    assert len(confirmed) == 4
