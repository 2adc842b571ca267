"""The protocol's rules: which methods count, and which answers can still change."""

import dataclasses

import pytest
from benchmarks.study.analysis import Point
from benchmarks.study.rules import is_settled, verdicts
from benchmarks.study.settings import QUICK, Cell

CELL, OTHER = Cell(32, 0.05), Cell(16, 0.05)
METHODS = ("sgd", "sam", "suffix-part", "esam")
SETTING = dataclasses.replace(
    QUICK,
    methods=METHODS,
    main=20,
    budgets=(10, 20, 40),
    base_budgets=(5,),
    seeds=tuple(range(4)),
    everywhere=METHODS[:3],
    also=(("sgd", 10, OTHER),),
)


def _point(method: str, budget: int, mean: float, seeds: int = 4, cell: Cell = CELL) -> Point:
    """Return a point whose seeds differ; the standard error of a mean difference is small."""
    noise = (0.0, 0.1, -0.1, 0.0) if method == "sgd" else (0.1, 0.0, 0.0, -0.1)
    values = {seed: mean + noise[seed] for seed in range(seeds)}
    return Point(method, cell, budget, cell == CELL, budget, values, values, values)


def _points(**means: float) -> list[Point]:
    """Return all points of the setting; methods have the given means at the main budget."""
    points = [
        _point(method, budget, means.get(method.replace("-", "_"), 40.0))
        for method, budget in SETTING.points()
    ]
    return [*points, _point("sgd", 10, 41.0, cell=OTHER)]


def test_a_method_counts_if_it_is_above_both_frontiers() -> None:
    found = verdicts(SETTING, _points(sam=42.0, suffix_part=44.0, esam=41.5), 20)
    assert found.keys() == {"suffix-part", "esam"}
    assert found["suffix-part"].counts
    assert found["suffix-part"].differences["sgd"].mean == pytest.approx(3.0)  # from 41, at 10
    assert (found["esam"].is_above("sgd"), found["esam"].is_above("sam")) == (True, False)
    assert not found["esam"].counts


def test_a_method_counts_only_after_the_correction_for_the_number_of_methods() -> None:
    points = _points(sam=41.0, suffix_part=41.22, esam=41.0)
    (raw,) = [v for name, v in verdicts(SETTING, points, 20).items() if name == "suffix-part"]
    found = raw.differences["sgd"]
    assert found.above and 0.05 / 3 < found.p < 0.05
    assert not raw.is_above("sgd")
    assert dataclasses.replace(raw, ps={}).is_above("sgd")


def test_differences_can_be_entirely_below_0() -> None:
    found = verdicts(SETTING, _points(esam=39.0, suffix_part=40.95), 20)
    assert found["esam"].differences["sgd"].below
    assert not found["suffix-part"].differences["sgd"].below


def _without(points: list[Point], method: str, budget: int, cell: Cell = CELL) -> list[Point]:
    """Return the points with a seed missing from one of them."""
    changed = [
        dataclasses.replace(point, finals={seed: point.finals[seed] for seed in range(3)})
        if (point.method, point.budget, point.cell) == (method, budget, cell)
        else point
        for point in points
    ]
    assert changed != points
    return changed


def test_an_answer_can_change_as_long_as_a_seed_is_missing_that_it_depends_on() -> None:
    points = _points()

    def settled(points: list[Point]) -> tuple[bool, bool]:
        """Return whether the first rule's answer is settled, and one difference from SGD's best."""
        return (
            is_settled(SETTING, points, 20, METHODS),
            is_settled(SETTING, points, 20, ["suffix-part"], ["sgd"]),
        )

    assert settled(points) == (True, True)
    for method, budget, cell, expected in (
        ("suffix-part", 20, CELL, (False, False)),
        ("sgd", 5, CELL, (False, False)),
        ("sgd", 10, OTHER, (False, False)),
        ("sam", 10, CELL, (False, True)),
        ("esam", 20, CELL, (False, True)),
        ("suffix-part", 10, CELL, (True, True)),
        ("sgd", 40, CELL, (True, True)),
    ):
        assert settled(_without(points, method, budget, cell)) == expected
    missing = [p for p in points if (p.method, p.budget) != ("sgd", 5)]
    assert settled(missing) == (False, False)
