"""The study's figures: which points they show, and how they are labelled."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from benchmarks.study import pictures
from benchmarks.study.analysis import Point
from benchmarks.study.settings import QUICK, Cell

CELL, OTHER = Cell(32, 0.05), Cell(16, 0.05)
SETTING = dataclasses.replace(
    QUICK,
    methods=("sgd", "sam", "suffix-part", "esam"),
    main=20,
    budgets=(10, 20),
    base_budgets=(5,),
    seeds=tuple(range(4)),
    words="some digits",
)


def _point(method: str, budget: int, mean: float, seeds: int = 4, cell: Cell = CELL) -> Point:
    values = {seed: mean + (0.0, 0.1, -0.1, 0.0)[seed] * len(method) for seed in range(seeds)}
    return Point(method, cell, budget, cell == CELL, budget, values, values, values)


def _points() -> list[Point]:
    """Return points with SGD's best at 10, with a cell that was not chosen."""
    return [
        _point("sgd", 5, 40.0),
        _point("sgd", 10, 41.0),
        _point("sgd", 10, 44.0, cell=OTHER),
        _point("sgd", 20, 43.0),
        _point("sam", 10, 40.0),
        _point("sam", 20, 45.0),
        _point("suffix-part", 10, 44.0),
        _point("suffix-part", 10, 50.0, cell=OTHER),
        _point("suffix-part", 20, 47.0),
        _point("esam", 20, 41.0),
    ]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which the axes of each figure are added, instead of a file."""
    saved: list[Any] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: saved.append(figure.axes[0]))
    return saved


def _curves(axes: Any) -> dict[str, list[float]]:
    """Return the accuracies of the labelled lines."""
    handles, labels = axes.get_legend_handles_labels()
    return {
        label: [round(float(y), 6) for y in handle.get_ydata()]
        for label, handle in zip(labels, handles, strict=True)
    }


def test_sgd_is_shown_at_its_best_at_each_budget_and_with_its_best_so_far(axes: list[Any]) -> None:
    pictures.draw_frontier(Path(), SETTING, _points())
    assert _curves(axes[0]) == {
        "SGD": [40.0, 44.0, 43.0],
        "SGD's best so far": [44.0, 44.0],
        "SAM": [40.0, 45.0],
        "Suffix(0.5), Part(0.25): half of the network, ascent on a quarter of the batch": [44, 47],
    }
    tuned = "tuned at each compute (SGD and SAM: their best configuration)"
    assert axes[0].get_title() == f"some digits\n4 seeds; {tuned}"


def test_points_with_missing_seeds_are_hollow_and_no_frontier(axes: list[Any]) -> None:
    points = [_point("sgd", 5, 45.0, seeds=3) if p.budget == 5 else p for p in _points()]
    pictures.draw_frontier(Path(), SETTING, points)
    curves = _curves(axes[0])
    assert curves["SGD"] == [45.0, 44.0, 43.0]
    assert curves["SGD's best so far"] == [44.0, 44.0]
    hollow = [
        round(float(line.get_ydata()[0]), 6)
        for line in axes[0].get_lines()
        if line.get_markerfacecolor() == "white"
    ]
    assert hollow == [45.0]
    assert axes[0].get_title() == (
        "some digits\n3 to 4 of 4 seeds; interim: some runs are missing; hollow: fewer than 4; "
        "tuned at each compute (SGD and SAM: their best configuration)"
    )


def test_the_best_so_far_is_not_shown_where_an_unfinished_point_is_better(axes: list[Any]) -> None:
    unfinished = _point("sgd", 20, 45.0, seeds=3)
    points = [unfinished if (p.method, p.budget) == ("sgd", 20) else p for p in _points()]
    pictures.draw_frontier(Path(), SETTING, points)
    assert "SGD's best so far" not in _curves(axes[0])


def test_points_of_very_few_seeds_are_left_out(axes: list[Any]) -> None:
    points = [_point("sgd", 5, 45.0, seeds=2) if p.budget == 5 else p for p in _points()]
    pictures.draw_frontier(Path(), SETTING, points)
    assert _curves(axes[0])["SGD"] == [44.0, 43.0]


def test_no_empty_figure_is_drawn(axes: list[Any]) -> None:
    pictures.draw_frontier(Path(), SETTING, [_point("sgd", 5, 45.0, seeds=2)])
    pictures.draw_differences(Path(), SETTING, [_point("sgd", 20, 45.0, seeds=2)])
    assert axes == []


def test_differences_say_from_what_and_of_how_many_epochs(axes: list[Any]) -> None:
    pictures.draw_differences(Path(), SETTING, _points())
    (drawn,) = axes
    assert [label.get_text() for label in drawn.get_yticklabels()] == [
        "the paper's ESAM, 12 epochs",
        "SGD, 20 epochs",
        "SAM, 10 epochs",
        "half of the network, ascent on a quarter of the batch\nSuffix(0.5), Part(0.25), 17 epochs",
    ]
    assert drawn.get_xlabel() == (
        "points of test accuracy above SGD's best (10 epochs), 95 % interval; "
        "grey: not significant; hollow: not tested"
    )
    colours = {
        label.get_text(): container.lines[0].get_markerfacecolor()
        for label, container in zip(drawn.get_yticklabels(), drawn.containers, strict=True)
    }
    assert colours["SGD, 20 epochs"] == "white"
    assert "white" not in [colours[name] for name in colours if not name.startswith("SGD")]
    assert drawn.get_title() == "some digits\nthe compute of 20 epochs of SGD; 4 seeds"
    means = [container.lines[0].get_xdata()[0] for container in drawn.containers]
    assert means == pytest.approx([-3.0, -1.0, 1.0, 3.0])


def test_differences_are_interim_only_if_they_can_change(axes: list[Any]) -> None:
    points = _points()
    pictures.draw_differences(Path(), SETTING, [p for p in points if p.method != "esam"])
    pictures.draw_differences(
        Path(), SETTING, [p for p in points if (p.method, p.budget) != ("suffix-part", 10)]
    )
    assert ["interim" in drawn.get_title() for drawn in axes] == [True, False]


def test_the_seeds_of_differences_are_those_that_both_have(axes: list[Any]) -> None:
    fewer = {0: 1.0, 1: 2.0, 2: 3.0}
    points = [dataclasses.replace(p, finals=fewer) if p.method == "sgd" else p for p in _points()]
    pictures.draw_differences(Path(), SETTING, points)
    assert "3 of 4 seeds; interim" in axes[0].get_title()
