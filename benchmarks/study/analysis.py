"""Frontiers of accuracy against compute, and paired differences, from the study's records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from scipy import stats

from benchmarks.run import Run
from benchmarks.study.fit import FIT
from benchmarks.study.planning import finals_by_key, tune
from benchmarks.study.settings import Cell, Setting

__all__ = [
    *(
        "Difference",
        "Point",
        "compute_of",
        "corrected_ps",
        "difference",
        "difference_from_frontier",
        "frontier",
        "holm",
        "interval",
        "records_by_cell",
        "reported_points",
    ),
]

#: A point of a frontier may cost this much more than the method compared with it, because the
#: numbers of epochs are whole.
TOLERANCE = 1.05


def compute_of(record: Mapping[str, Any]) -> float:
    """Return the compute of a run in epochs of SGD, from its counted operations."""
    run, images = record["run"], record["data"]["training_images"]
    seen = images // run["batch"] * run["batch"] / images  # the last, smaller batch is dropped
    return float(record["flops_ratio"] * run["epochs"] * seen)


@dataclass(frozen=True)
class Point:
    """The runs of a method with one cell at one budget.

    Args:
        method: a key of `METHODS`.
        cell: its hyperparameters.
        budget: in epochs of SGD.
        chosen: whether tuning chose this cell at this budget.
        compute: the counted cost of its runs, in epochs of SGD.
        finals: final test accuracies of the finished runs, by seed.
        bests: best test accuracies, by seed.
        fits: accuracies on the training samples, by seed.
        recomputed: final test accuracies after `update_bn`, by seed, if they were measured.
        left_out: by seed, how often the samples were left out of the descent pass: means of four
            quarters, from the one that was left out least. Empty if the method selects no samples.
        fits_by_quarter: by seed, accuracies on these quarters.
    """

    method: str
    cell: Cell
    budget: int
    chosen: bool
    compute: float
    finals: Mapping[int, float]
    bests: Mapping[int, float]
    fits: Mapping[int, float]
    recomputed: Mapping[int, float] = field(default_factory=dict)
    left_out: Mapping[int, Sequence[float]] = field(default_factory=dict)
    fits_by_quarter: Mapping[int, Sequence[float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The mean final accuracy."""
        return mean(self.finals.values())


def records_by_cell(
    setting: Setting,
    method: str,
    budget: int,
    seeds: Iterable[int],
    records: Iterable[Mapping[str, Any]],
) -> dict[Cell, dict[int, Mapping[str, Any]]]:
    """Return a method's records at a budget, by cell and seed.

    Args:
        setting: the setting.
        method: the method.
        budget: the budget.
        seeds: the seeds to include.
        records: all records of the setting.
    """
    found: dict[Cell, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        run = Run(**record["run"])
        cell = Cell.of(run)
        same = run == setting.run(method, cell, budget, run.seed) and record.get("probe") == FIT
        if same and run.seed in seeds:
            found.setdefault(cell, {})[run.seed] = record
    return found


def reported_points(setting: Setting, records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points of the chosen cells, and of other cells with all reported seeds.

    Args:
        setting: the setting.
        records: the records of the finished runs.
    """
    finals = finals_by_key(records)
    points = []
    for method, budget in setting.points():
        chosen = tune(setting, method, budget, finals).chosen
        cells = records_by_cell(setting, method, budget, setting.seeds, records)
        points += [
            _point(method, cell, budget, found, chosen=cell == chosen)
            for cell, found in cells.items()
            if cell == chosen or len(found) == len(setting.seeds)
        ]
    return points


def _point(
    method: str, cell: Cell, budget: int, by_seed: Mapping[int, Mapping[str, Any]], *, chosen: bool
) -> Point:
    ends = {seed: record["history"][-1] for seed, record in by_seed.items()}

    def measured(name: str) -> dict[int, Any]:
        return {seed: end[name] for seed, end in ends.items() if name in end}

    return Point(
        method,
        cell,
        budget,
        chosen,
        mean(compute_of(record) for record in by_seed.values()),
        {seed: record["final"] for seed, record in by_seed.items()},
        {seed: record["best"] for seed, record in by_seed.items()},
        {seed: end["training_accuracy"] for seed, end in ends.items()},
        measured("recomputed_accuracy"),
        measured("left_out_by_rejection"),
        measured("accuracy_by_rejection"),
    )


def frontier(points: Iterable[Point], method: str, compute: float) -> Point | None:
    """Return the point of a method with the highest mean within a compute, or None.

    As long as runs are missing, only the points with the most seeds are considered: one with a few
    would also limit each comparison to these few.

    Args:
        points: all points of the setting.
        method: the method whose frontier this is.
        compute: in epochs of SGD; a point may cost 5 % more.
    """
    affordable = [p for p in points if p.method == method and p.compute <= TOLERANCE * compute]
    most = max((len(p.finals) for p in affordable), default=0)
    full = (p for p in affordable if len(p.finals) == most)
    return max(full, key=lambda point: point.mean, default=None)


def interval(values: Sequence[float]) -> float:
    """Return the half width of the mean's 95 % interval (Student's t); infinite for one value."""
    n = len(values)
    if n < 2:
        return float("inf")
    return float(stats.t.ppf(0.975, n - 1)) * stdev(values) / n**0.5


@dataclass(frozen=True)
class Difference:
    """A mean difference on the same seeds.

    Args:
        mean: in points of accuracy.
        half: half the width of its 95 % interval.
        p: the two-sided p value of the hypothesis that it is 0; 1 for one seed.
        seeds: the number of seeds.
    """

    mean: float
    half: float
    p: float
    seeds: int

    @property
    def above(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.mean - self.half > 0.0

    @property
    def below(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.mean + self.half < 0.0

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.2f} (1)"
        return f"{self.mean:+.2f} ± {self.half:.2f} ({self.seeds})"


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Return the mean difference of accuracies on the seeds that both have, or None.

    Args:
        one: accuracies by seed.
        other: the accuracies to subtract, by seed.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    values = [one[seed] - other[seed] for seed in seeds]
    p = 1.0
    if len(values) > 1:
        spread = stdev(values)
        p = float(stats.ttest_1samp(values, 0.0).pvalue) if spread else float(not any(values))
    return Difference(mean(values), interval(values), p, len(values))


def difference_from_frontier(
    points: Sequence[Point], point: Point, method: str
) -> Difference | None:
    """Return a point's difference from a method's frontier at its compute.

    None without such a frontier, and for the frontier's own point.

    Args:
        points: all points of the setting.
        point: the point to compare.
        method: the method whose frontier it is compared with.
    """
    other = frontier(points, method, point.compute)
    return None if other is None or other == point else difference(point.finals, other.finals)


def corrected_ps(setting: Setting, points: Sequence[Point], reference: str) -> dict[str, float]:
    """Return Holm's p values of the methods' differences from a method's frontier.

    Args:
        setting: the setting.
        points: all its points; those of the main budget are compared.
        reference: the method of the frontier.
    """
    ps: dict[str, float] = {}
    for point in points:
        if point.chosen and point.budget == setting.main and point.method not in ("sgd", reference):
            found = difference_from_frontier(points, point, reference)
            if found is not None:
                ps[point.method] = found.p
    return holm(ps)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Return p values corrected by Holm's procedure, with the same keys."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for i, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        highest = max(highest, min(1.0, (len(ps) - i) * ps[name]))
        corrected[name] = highest
    return corrected
