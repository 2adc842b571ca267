"""The study's conclusions from its records: frontiers, intervals and corrections by hand."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from benchmarks.study.analysis import (
    Point,
    compute_of,
    corrected_ps,
    difference,
    difference_from_frontier,
    frontier,
    holm,
    interval,
    reported_points,
)
from benchmarks.study.fit import FIT
from benchmarks.study.planning import make_plan
from benchmarks.study.settings import CONTENDERS, METHODS, QUICK, Cell
from benchmarks.study.tables import write_report

SETTING = dataclasses.replace(QUICK, budgets=(10, 20), main=10)


def _point(method: str, compute: float, *finals: float) -> Point:
    values = dict(enumerate(finals))
    return Point(method, Cell(32, 0.05), 20, True, compute, values, values, values)


def test_intervals_are_from_students_t() -> None:
    # Mean 2, standard deviation 1, n = 3: t(.975, 2) = 4.302653 times 1 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([1.0]) == float("inf")


def test_differences_are_taken_on_the_same_seeds() -> None:
    one, other = _point("sam", 20, 3.0, 5.0, 7.0, 100.0), _point("sgd", 20, 2.0, 3.0, 4.0)
    found = difference(one.finals, other.finals)
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert found.p == pytest.approx(0.0742, abs=1e-4)  # t = 2 sqrt(3), 2 degrees of freedom
    assert not found.above
    assert difference(one.finals, {}) is None


def test_above_means_that_the_whole_interval_is_above_0() -> None:
    one, other = _point("sam", 20, 3.0, 4.0, 5.0), _point("sgd", 20, 1.0, 2.1, 2.9)
    assert difference(one.finals, other.finals).above
    assert not difference(other.finals, one.finals).above


def test_a_frontier_is_the_best_accuracy_up_to_each_cost() -> None:
    cheap, dear, between = (
        _point("sgd", 10, 44.0),
        _point("sgd", 40, 46.0),
        _point("sgd", 20.9, 45.0),
    )
    points = [cheap, dear, between, _point("sam", 10, 50.0)]
    assert frontier(points, "sgd", 20.0) == between
    assert frontier(points, "sgd", 19.0) == cheap
    assert frontier(points, "sgd", 40.0) == dear
    assert frontier(points, "sgd", 5.0) is None


def test_a_point_with_missing_seeds_is_no_frontier_as_long_as_there_is_a_better_known_one() -> None:
    known, begun = _point("sgd", 10, 44.0, 45.0), _point("sgd", 20, 50.0)
    assert frontier([known, begun], "sgd", 20.0) == known
    assert frontier([begun], "sgd", 20.0) == begun


def test_holms_correction_by_hand() -> None:
    ps = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    expected = {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    assert holm(ps) == pytest.approx(expected)


def test_compute_is_measured_in_epochs_of_sgd() -> None:
    record = {"run": {"epochs": 10, "batch": 64}, "flops_ratio": 2.0}
    record["data"] = {"training_images": 100}  # 64 of 100 images per epoch
    assert compute_of(record) == pytest.approx(12.8)


def _records(gain: dict[str, float]) -> list[dict[str, Any]]:
    """Return the records of a study in which methods are better than SGD by the given gains."""
    generator, records = random.Random(0), []
    while not (plan := make_plan(SETTING, records)).done:
        for run in plan.runs:
            final = 40.0 + gain.get(run.method, 0.0) - run.batch / 100 + generator.gauss(0, 0.01)
            end: dict[str, Any] = {"training_accuracy": 99.0, "recomputed_accuracy": final + 0.5}
            if run.method == "esam":
                end["left_out_by_rejection"] = [0.0, 1.0, 2.0, 3.0 + run.seed]
                end["accuracy_by_rejection"] = [90.0, 80.0, 70.0, 60.0 + run.seed]
            records.append(
                {
                    "run": dataclasses.asdict(run),
                    "probe": FIT,
                    "revision": "abc",
                    "final": final,
                    "best": final + 1,
                    "flops_ratio": METHODS[run.method],
                    "history": [end],
                    "data": {"training_images": 128},
                    "machine": {"processor": "one", "threads": 1, "accelerator": None},
                    "versions": {"torch": "2"},
                }
            )
    return records


def test_other_cells_are_points_if_they_have_all_seeds() -> None:
    records = _records({})
    (chosen,) = [p.cell for p in reported_points(SETTING, records) if p.method == "previous"]
    other = dataclasses.replace(chosen, lr=2 * chosen.lr)
    for seed in SETTING.seeds:
        assert all(point.chosen for point in reported_points(SETTING, records))
        run = SETTING.run("previous", other, SETTING.main, seed)
        records.append({**records[0], "run": dataclasses.asdict(run), "final": 50.0})
    (found,) = [point for point in reported_points(SETTING, records) if not point.chosen]
    assert (found.method, found.cell, found.mean) == ("previous", other, 50.0)
    assert frontier(reported_points(SETTING, records), "previous", 10.0) == found


def test_methods_are_corrected_for_their_number_and_not_for_the_reference() -> None:
    points = reported_points(SETTING, _records({"sam": 1.0, "esam": -2.0}))
    for reference in ("sgd", "sam"):
        ps = corrected_ps(SETTING, points, reference)
        assert set(ps) == set(METHODS) - {"sgd", reference}
        raw = {
            p.method: difference_from_frontier(points, p, reference)
            for p in points
            if p.method in ps and p.budget == SETTING.main
        }
        smallest = min(ps, key=lambda name: ps[name])
        assert ps[smallest] == pytest.approx(min(1.0, len(ps) * raw[smallest].p))


def _rows(page: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of the rows of a section's table, by the text of their first cell."""
    (section,) = [part for part in page.split("\n## ") if part.startswith(heading)]
    found = [line.split("|") for line in section.splitlines() if line.startswith("|")]
    assert len({cells[1] for cells in found}) == len(found)
    return {cells[1].strip(): cells for cells in found}


def test_a_report_lists_the_methods_above_the_frontiers(tmp_path: Path) -> None:
    records = _records({"sam": 1.0, "esam": -2.0, "suffix-part": 4.0})
    points = reported_points(SETTING, records)
    assert len(points) == len(METHODS) + len(CONTENDERS)
    assert {len(p.finals) for p in points} == {len(SETTING.seeds)}
    folder = tmp_path / "study-quick"
    folder.mkdir()
    (folder / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = write_report(SETTING, folder)
    assert "All runs are finished." in page
    rows = _rows(page, "Against the frontiers")
    for row, column, gain in (
        ("10: SAM", 3, 1.0),
        ("10: the paper's ESAM", 3, -2.0),
        ("10: the paper's ESAM", 5, -3.0),
    ):
        assert float(rows[row][column].split()[0].strip("*")) == pytest.approx(gain, abs=0.1)
    assert "**" not in rows["10: the paper's ESAM"][3]
    assert (rows["10: SAM"][4].strip() != "", rows["10: SAM"][6].strip()) == (True, "")
    assert rows["10: the paper's ESAM"][6].strip() != ""
    assert rows["10: SGD"][3].strip() == ""
    left_out = _rows(page, "The samples that were left out most")["10: the paper's ESAM"]
    expected = ["0.0 / 1.0 / 2.0 / 3.5 of 6", "90.0", "80.0", "70.0", "60.50 ± 6.35 (2)", "99.0"]
    assert [text.strip() for text in left_out[2:-1]] == expected
    rules = _rows(page, "By the rule")
    assert rules["method"][2:5] == [
        " counts at 10 ",
        " from SGD's best at 10 ",
        " from SGD's best at 20 ",
    ]
    assert rules["Suffix(0.5), Part(0.25)"][2].strip() == "**yes**"
    assert rules["the paper's ESAM"][2].strip() == "no: not significantly above SGD's or SAM's"
    assert ", below 0" in rules["the paper's ESAM"][3]
    assert rules["the paper's ESAM"][4].strip() == ""
    (averaged,) = [line for line in page.splitlines() if "averaged weights in `small`" in line]
    assert averaged.startswith("Suffix(0.5), Part(0.25) costs")
    gain = float(averaged.partition("difference is **")[2].split()[0])
    assert gain == pytest.approx(4.0, abs=0.1)
    rows = _rows(page, "Statistics of batch normalization")
    assert "+0.50 ± 0.00 (2)" in rows["SAM"][4]  # the gain from recomputed statistics
    for name in ("frontier.png", "differences.png"):
        assert (folder / name).stat().st_size > 10_000
    (folder / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:-1]))
    interim = write_report(SETTING, folder)
    assert "**Interim" in interim
    assert "(interim)" in interim and "(interim)" not in page
