"""The tables of a setting, from its records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import markdown
from benchmarks.store import Store
from benchmarks.study.analysis import (
    Difference,
    Point,
    corrected_ps,
    difference,
    difference_from_frontier,
    interval,
    records_by_cell,
    reported_points,
)
from benchmarks.study.pictures import cell_text, draw_differences, draw_frontier, titles_of
from benchmarks.study.planning import finals_by_key, make_plan, tune
from benchmarks.study.rules import FRONTIERS, Verdict, is_settled, verdicts
from benchmarks.study.settings import Setting

__all__ = ["write_report"]

#: Methods whose steps cost less must also be better than averaged weights.
_CHEAP = 1.2

_EXPLANATION = """Differences of final accuracy on the same seeds, with 95 % intervals, in bold if
the whole interval is above 0. p values are those of the differences from the two frontiers at
budget {}, each corrected by Holm's procedure for the number of methods (SGD is not among them)."""


_RULES = """A method *counts* at budget {} if it is above {} best and SAM's best for the same
compute: both intervals are above 0, and both p values, corrected by Holm's procedure, are below .05
(rule 1 of `docs/study-protocol.md`). To be recommended, it must count in `small` and in `fresh`,
and the interval of its difference from the base optimizer's best must not be entirely below 0 at
any budget of `small`, `wide`, `noisy` or `text` (rule 2)."""


_RECOMPUTED = """The change of the final accuracy if `torch.optim.swa_utils.update_bn` recomputes
the statistics from the training samples at the final weights, at budget {}, with 95 % intervals.
Methods of `ascend=` run no pass with the whole batch at the weights, so their running
statistics are those of perturbed weights or of parts of the batch."""


_REJECTION = """Each run's training samples in four quarters, from the quarter that was left out of
the descent pass least to the one that was left out most: how often, and the accuracy at the end in
percent. Means over seeds; for the last quarter with 95 % intervals."""


def write_report(setting: Setting, folder: Path) -> str:
    """Write study.md and the figures of a setting, and return the page.

    Args:
        setting: the setting.
        folder: the folder of its runs.
    """
    records = Store(folder).records()
    points = reported_points(setting, records)
    plan = make_plan(setting, records)
    counts = sorted(len(p.finals) for p in points if p.chosen) or [0]
    seeds = f"{counts[0]} to {counts[-1]} of {len(setting.seeds)}"
    state = (
        "All runs are finished." if plan.done else "**Interim: some runs have not been made yet.**"
    )
    parts = [
        f"# {setting.name}: {setting.title}",
        f"{state} {len(records)} runs; {seeds} reported seeds per point.",
        _places(records),
        "## Accuracy and compute",
        _points_table(setting, points),
        f"## Against the frontiers of {setting.base} and SAM",
        _EXPLANATION.format(setting.main),
        _differences_table(setting, points),
        *_rules_parts(setting, points),
        *_rejection_parts(setting, points),
        *_recomputed_parts(setting, points),
        "## Tuning",
        _tuning_table(setting, records),
    ]
    page = "\n\n".join(part.strip() for part in parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.md").write_text(page, "utf-8")
    if points:
        draw_differences(folder / "differences.png", setting, points)
        draw_frontier(folder / "frontier.png", setting, points)
    return page


def _places(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the processors or GPUs, torch versions and revisions that made the runs."""
    every = [place for r in records for place in (r, *r.get("earlier_places", ()))]
    places = {
        (
            place["machine"]["accelerator"] or place["machine"]["processor"],
            place["machine"]["threads"],
            place["versions"]["torch"],
        )
        for place in every
    }
    revisions = sorted({place["revision"] for place in every})
    made = "; ".join(f"{name}, {n} thread, torch {torch}" for name, n, torch in sorted(places))
    return f"Made with: {made or 'nothing yet'}. Revisions: {', '.join(revisions) or 'none'}."


def _with_interval(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.2f} (1)"
    return f"{mean:.2f} ± {interval(values):.2f} ({len(values)})"


def _points_table(setting: Setting, points: Sequence[Point]) -> str:
    """Return the table of all points: means with 95 % intervals and numbers of seeds."""
    titles = titles_of(setting)
    columns = ("method", "cell", "compute", "final, %", "best, %", "on the training samples, %")
    rows = [
        [
            titles[p.method],
            cell_text(p.method, p.cell) + ("" if p.chosen else ", not the chosen cell"),
            f"{p.compute:.1f}",
            _with_interval(list(p.finals.values())),
            _with_interval(list(p.bests.values())),
            f"{sum(p.fits.values()) / len(p.fits):.1f}",
        ]
        for p in points
    ]
    return markdown(columns, rows)


def _differences_table(setting: Setting, points: Sequence[Point]) -> str:
    """Return the table of the methods' differences from both frontiers."""
    titles = titles_of(setting)
    rows = []
    corrected = {name: corrected_ps(setting, points, name) for name in ("sgd", "sam")}
    budgets = sorted({p.budget for p in points}, key=lambda b: (b != setting.main, b))
    for budget in budgets:
        here = {p.method: p for p in points if p.chosen and p.budget == budget}
        against = {
            method: [difference_from_frontier(points, point, name) for name in ("sgd", "sam")]
            for method, point in here.items()
        }
        for method, (sgd, sam) in against.items():
            ps = [
                corrected[name].get(method) if budget == setting.main else None
                for name in ("sgd", "sam")
            ]
            rows.append(
                [
                    f"{budget}: {titles[method]}",
                    f"{here[method].compute:.1f}",
                    _difference_text(sgd),
                    _p_text(ps[0]),
                    _difference_text(sam),
                    _p_text(ps[1]),
                ]
            )
    columns = ("budget and method", "compute", f"from {setting.base}'s", "p", "from SAM's", "p")
    return markdown(columns, rows)


def _rules_parts(setting: Setting, points: Sequence[Point]) -> list[str]:
    """Return the section about the protocol's rules; empty without a method to compare."""
    titles, base = titles_of(setting), f"{setting.base}'s"
    by_budget = {budget: verdicts(setting, points, budget) for budget in setting.budgets}
    if not any(by_budget.values()):
        return []
    settled = is_settled(setting, points, setting.main, setting.methods)
    planned, rows = setting.points(), []
    for method in (name for name in setting.methods if name not in FRONTIERS):
        first = by_budget[setting.main].get(method)
        answer = _answer(first, base) if first else "not known yet"
        row = [titles[method], answer if settled or first is None else f"{answer} (interim)"]
        for budget, found in by_budget.items():
            text = "not known yet" if (method, budget) in planned else ""
            if method in found and (gain := found[method].differences["sgd"]):
                text = _difference_text(gain) + (", below 0" if gain.below else "")
                if not is_settled(setting, points, budget, [method], ["sgd"]):
                    text += " (interim)"
            row.append(text)
        rows.append(row)
    columns = ("method", f"counts at {setting.main}")
    columns += tuple(f"from {base} best at {budget}" for budget in setting.budgets)
    explanation = _RULES.format(setting.main, base)
    if any("(interim)" in cell for row in rows for cell in row):
        explanation += ' Answers with "(interim)" can change.'
    averaged = _from_averaged_weights(setting, points, by_budget[setting.main])
    return ["## By the rule", explanation, markdown(columns, rows), *averaged]


def _answer(found: Verdict, base: str) -> str:
    """Return whether a method counts, and if not, why."""
    names = {"sgd": base, "sam": "SAM's"}
    missing = [names[name] for name in FRONTIERS if not found.is_above(name)]
    return f"no: not significantly above {' or '.join(missing)}" if missing else "**yes**"


def _from_averaged_weights(
    setting: Setting, points: Sequence[Point], found: Mapping[str, Verdict]
) -> list[str]:
    """Return sentences about the cheap methods that count: are averaged weights as good?"""
    here = {p.method: p for p in points if p.chosen and p.budget == setting.main}
    return [
        f"{titles_of(setting)[method]} costs less than {_CHEAP}, so it must also be better than "
        f"averaged weights in `small`; here the difference is {_difference_text(gain)}."
        for method, verdict in found.items()
        if verdict.counts and setting.cost(method) < _CHEAP and method != "sgd-ema"
        if "sgd-ema" in here
        if (gain := difference(here[method].finals, here["sgd-ema"].finals)) is not None
    ]


def _p_text(p: float | None) -> str:
    """Return a p value as text."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _recomputed_parts(setting: Setting, points: Sequence[Point]) -> list[str]:
    """Return the section about recomputed statistics; empty for networks without any."""
    titles = titles_of(setting)
    here = [p for p in points if p.chosen and p.budget == setting.main and p.recomputed]
    rows = [
        [
            titles[p.method],
            f"{p.mean:.2f}",
            _with_interval(list(p.recomputed.values())),
            _difference_text(difference(p.recomputed, p.finals)),
        ]
        for p in here
    ]
    if not rows:
        return []
    table = markdown(("method", "final, %", "after `update_bn`, %", "difference"), rows)
    explanation = _RECOMPUTED.format(setting.main)
    return ["## Statistics of batch normalization", explanation, table]


def _rejection_parts(setting: Setting, points: Sequence[Point]) -> list[str]:
    """Return the section about samples that were left out; empty if no method leaves any out."""
    titles = titles_of(setting)
    rows = []
    for p in points:
        if not p.left_out:
            continue
        left_out = [f"{sum(q) / len(q):.1f}" for q in zip(*p.left_out.values(), strict=True)]
        quarters = list(zip(*p.fits_by_quarter.values(), strict=True))
        rows.append(
            [
                f"{p.budget}: {titles[p.method]}" + ("" if p.chosen else ", not the chosen cell"),
                f"{' / '.join(left_out)} of {setting.epochs(p.method, p.budget)}",
                *(f"{sum(quarter) / len(quarter):.1f}" for quarter in quarters[:3]),
                _with_interval(quarters[3]),
                f"{sum(p.fits.values()) / len(p.fits):.1f}",
            ]
        )
    if not rows:
        return []
    columns = ("budget and method", "times left out, of all epochs")
    columns += ("1st quarter", "2nd", "3rd", "4th, left out most", "all samples")
    return ["## The samples that were left out most", _REJECTION, markdown(columns, rows)]


def _difference_text(found: Difference | None) -> str:
    """Return a difference as text, in bold if its whole interval is above 0."""
    if found is None:
        return ""
    return f"**{found}**" if found.above else str(found)


def _tuning_table(setting: Setting, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of all cells of the tuning: per method and budget, the best first."""
    finals = finals_by_key(records)
    titles = titles_of(setting)
    rows = []
    for method, budget in setting.points():
        found = records_by_cell(setting, method, budget, setting.tuning_seeds, records)
        own = {
            cell: {seed: record["final"] for seed, record in by_seed.items()}
            for cell, by_seed in found.items()
        }
        chosen = tune(setting, method, budget, finals).chosen
        for cell in sorted(own, key=lambda c: (-len(own[c]), -sum(own[c].values()) / len(own[c]))):
            values = own[cell]
            shown = ", ".join(f"{values[seed]:.2f}" for seed in sorted(values))
            mean = f"{sum(values.values()) / len(values):.2f}"
            name = f"{budget}: {titles[method]}, {cell_text(method, cell)}"
            rows.append([name, shown, mean, "chosen" if cell == chosen else ""])
    return markdown(("budget, method and cell", "final, % (tuning seeds)", "mean", ""), rows)
