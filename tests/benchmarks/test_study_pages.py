"""The tables of docs/study.md and README.md hold what the committed runs of the study give.

A table is found by its section and a column; its rows by the words for the method and by their
epochs, so other words can change. `TABLES` says what its columns show.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path

import pytest
from benchmarks.store import Store
from benchmarks.study.analysis import (
    Point,
    corrected_ps,
    difference_from_frontier,
    interval,
    reported_points,
)
from benchmarks.study.rules import FRONTIERS
from benchmarks.study.settings import SETTINGS

ROOT = Path(__file__).parents[2]
MINUS = "\N{MINUS SIGN}"

#: Words in the first cell of a row, for each method. The first entry whose words all occur is it.
METHOD_WORDS = (
    ("suffix-part", ("Suffix(0.5)", "Part(0.25)")),
    ("half-suffix", ("Suffix(0.5)", "Proportional(0.5)")),
    ("part-random", ("Part(0.5)", "Random(0.5)")),
    ("part", ("Part(0.25)",)),
    ("momentum", ("Momentum()",)),
    ("previous", ("Previous()",)),
    ("sgd-ema", ("averaged weights",)),
    ("esam", ("the paper's ESAM",)),
    ("sam", ("SAM",)),
    ("sgd", ("SGD",)),
    ("sgd", ("AdamW",)),
)


@dataclass(frozen=True)
class Columns:
    """Columns of a table that show the same runs.

    Args:
        shown: what a column shows: "cost" (of a step), "accuracy", "sgd" or "sam" (the difference
            from this method's best), or "fit" (the accuracy on the training samples).
        epochs: the column that has the epochs of the runs; or
        budget: their budget.
        cell: the column that has their batch size, learning rate and rho; or
        chosen_at: the budget for which these were chosen. With neither: the best runs of SGD and
            SAM, and those of the other methods with what was chosen for this budget.
    """

    shown: Mapping[int, str]
    epochs: int | None = None
    budget: int | None = None
    cell: int | None = None
    chosen_at: int | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name: its name in the test's output.
        page: the file.
        heading: the section's heading, or the start of the page.
        columns: words in its first line; no other table of the section has all of them.
        setting: the setting of the study.
        groups: what its columns show.
    """

    name: str
    page: str
    heading: str
    columns: tuple[str, ...]
    setting: str
    groups: tuple[Columns, ...]


STUDY = "docs/study.md"
_SINGLE = (Columns({3: "accuracy", 4: "sgd", 5: "fit"}, epochs=1, cell=2),)
TABLES = (
    Table(
        *("README", "README.md", "# esam", ("over SGD's best",), "small"),
        (Columns({1: "cost", 3: "accuracy", 4: "sgd"}, epochs=2),),
    ),
    Table(
        *("equal compute", STUDY, "## At equal compute", ("over SGD's best",), "small"),
        (Columns({1: "cost", 4: "accuracy", 5: "sgd", 6: "sam"}, epochs=2, cell=3),),
    ),
    Table(
        *("other classes", STUDY, "## Twenty other classes", ("over SGD's best",), "fresh"),
        (Columns({2: "accuracy", 3: "sgd", 4: "sam"}, epochs=1),),
    ),
    Table(
        *("half of the compute", STUDY, "## When it pays", ("as tuned at compute 20",), "small"),
        (
            Columns({2: "accuracy", 3: "sgd"}, epochs=1, chosen_at=20),
            Columns({5: "accuracy", 6: "sgd", 7: "fit"}, epochs=1, cell=4),
        ),
    ),
    Table(
        *(
            "twice the compute",
            STUDY,
            "## When it pays",
            ("epochs | batch", "| accuracy, %", "over SGD's best"),
        ),
        *("small", _SINGLE),
    ),
    Table(
        *("wrong labels", STUDY, "## When it pays", ("compute 10, as tuned at 20",), "noisy"),
        (
            Columns({2: "accuracy"}, budget=10, cell=1),
            Columns({3: "accuracy", 4: "sgd"}, budget=20, cell=1),
            Columns({6: "accuracy", 7: "sgd"}, budget=10, cell=5),
        ),
    ),
    Table(
        *("wrong labels, twice", STUDY, "## When it pays", ("accuracy with wrong labels",)),
        *("noisy", _SINGLE),
    ),
    Table("text", STUDY, "## When it pays", ("over AdamW |",), "text", _SINGLE),
    Table("text, twice", STUDY, "## When it pays", ("over AdamW's best",), "text", _SINGLE),
    Table("wide", STUDY, "## When it pays", ("accuracy on the wider",), "wide", _SINGLE),
)


@cache
def _points(name: str) -> list[Point]:
    records = Store(ROOT / f"benchmarks/results/study-{name}").records()
    return reported_points(SETTINGS[name], records)


@cache
def _ps(name: str, reference: str) -> dict[str, float]:
    return corrected_ps(SETTINGS[name], _points(name), reference)


def _rows(table: Table) -> list[list[str]]:
    """Return the cells of a table's rows."""
    level = table.heading.split()[0]
    text = (ROOT / table.page).read_text("utf-8")
    sections = re.split(rf"^(?={level} )", text, flags=re.M)
    (section,) = [part for part in sections if part.startswith(table.heading)]
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", section, re.M)]
    (found,) = [block for block in blocks if all(c in block[0] for c in table.columns)]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in found[2:]]


def _method(title: str) -> str:
    return next(name for name, words in METHOD_WORDS if all(word in title for word in words))


def _point(table: Table, row: list[str], group: Columns) -> Point:
    """Return the runs that some columns of a row show."""
    setting, method = SETTINGS[table.setting], _method(row[0])
    budget = group.budget
    if group.epochs is not None:
        epochs = int(row[group.epochs])
        budgets = {*setting.budgets, *setting.base_budgets}
        (budget,) = [b for b in budgets if setting.epochs(method, b) == epochs]
    points = [p for p in _points(table.setting) if p.method == method]
    here = [p for p in points if p.budget == budget]
    if group.chosen_at is not None:
        (cell,) = [p.cell for p in points if p.budget == group.chosen_at and p.chosen]
        here = [p for p in here if p.cell == cell]
    elif group.cell is not None:  # "16, .05, .4"; the share of averaged weights is not shown
        values = [float(part.strip("* ")) for part in row[group.cell].split(",")]
        here = [
            p for p in here if [p.cell.batch, p.cell.lr, p.cell.strength][: len(values)] == values
        ]
    elif method in FRONTIERS:
        return max(here, key=lambda p: p.mean)
    else:
        here = [p for p in here if p.chosen]
    assert len(here) == 1, f"{row[0]}: {len(here)} points"
    return here[0]


@dataclass(frozen=True)
class Expected:
    """The numbers that a cell must show; `half` and `p` only if there are any."""

    value: float
    half: float | None = None
    p: float | None = None


def _expected(table: Table, point: Point, what: str) -> Expected | None:
    """Return the numbers of a cell from the records; None if there is no such difference."""
    setting = SETTINGS[table.setting]
    if what == "cost":
        return Expected(setting.cost(point.method))
    if what == "fit":
        return Expected(sum(point.fits.values()) / len(point.fits))
    if what == "accuracy":
        return Expected(point.mean, interval(list(point.finals.values())))
    found = difference_from_frontier(_points(table.setting), point, what)
    if found is None:
        return None
    main = point.budget == setting.main and point.chosen
    return Expected(
        found.mean, found.half, _ps(table.setting, what).get(point.method) if main else None
    )


_CELL = re.compile(
    r"(?P<value>[+-]?\d+(?:\.\d+)?)(?: ± (?P<half>\d+\.\d+))?"
    r"(?: \([^)]*p (?P<sign>[=<]) (?P<p>\.\d+)[^)]*\))?"
)


def _agrees(text: str, expected: Expected | None) -> bool:
    """Return whether a cell shows the expected numbers, rounded to the digits that it has."""
    match = _CELL.fullmatch(text.replace("*", "").replace(MINUS, "-"))
    if match is None or expected is None:
        return False
    rounded = _rounded(match["value"], expected.value)
    if expected.half is not None:
        rounded = rounded and match["half"] is not None and _rounded(match["half"], expected.half)
    if match["p"] is None:
        return rounded
    if expected.p is None:
        return False
    if match["sign"] == "<":
        return rounded and match["p"] == ".001" and expected.p < 0.001
    return rounded and _rounded(match["p"], expected.p)


def _rounded(text: str, value: float) -> bool:
    """Return whether a number is a value rounded to its digits.

    The value may have been rounded to one digit more before, as it is in the reports.
    """
    digits = len(text.partition(".")[2])
    last = Decimal(10) ** -digits
    once = (Decimal(value), Decimal(f"{value:.{digits + 1}f}"))
    return Decimal(text) in {number.quantize(last, ROUND_HALF_UP) for number in once}


def _shown(table: Table) -> Iterator[tuple[str, str, Expected | None]]:
    """Yield the text of each cell to compare, with the row's title and the expected numbers."""
    for row in _rows(table):
        for group in table.groups:
            if not any(row[column] for column in group.shown):  # these runs were not made
                continue
            point = _point(table, row, group)
            for column, what in group.shown.items():
                if row[column] or what == "accuracy":
                    yield row[0], row[column], _expected(table, point, what)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_numbers_are_those_of_the_runs(table: Table) -> None:
    shown = list(_shown(table))
    assert len(shown) >= 6
    assert [entry for entry in shown if not _agrees(*entry[1:])] == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_changed_number_is_noticed(table: Table) -> None:
    signs = f"+{MINUS}"
    for _, text, expected in _shown(table):
        for digit in re.finditer(r"\d(?!\d|\.)", text):  # the last of each number
            place, other = digit.start(), str((int(digit[0]) + 5) % 10)
            assert not _agrees(text[:place] + other + text[place + 1 :], expected)
        if text.strip("*")[0] in signs:
            assert not _agrees(text.translate(str.maketrans(signs, signs[::-1])), expected)
