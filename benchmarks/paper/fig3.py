"""Figure 3: accuracy against speed of SWP alone by beta, and SDS alone by gamma, .3 to .9."""

import argparse
from collections.abc import Sequence
from statistics import mean

from benchmarks.arguments import whole_share
from benchmarks.figures import panels, save
from benchmarks.machine import provenance
from benchmarks.paper.comparison import is_steadily_timed
from benchmarks.paper.options import parse, recipe_runs
from benchmarks.report import mean_and_error, write_json, write_tables
from benchmarks.train import train

__all__ = ["main"]

COLUMNS = ("method", "accuracy %", "FLOPs / SGD", "images/s", "% of SAM's speed")


def _add(parser: argparse.ArgumentParser) -> None:
    values = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    parser.add_argument("--values", nargs="+", type=whole_share, default=values, metavar="SHARE")


def main(arguments: Sequence[str] = ()) -> None:
    """Train, write and draw."""
    options = parse(
        "fig3",
        __doc__,
        arguments,
        add=_add,
        full={"seeds": [0, 1, 2]},
        quick={"values": [0.3, 0.6, 0.9], "epochs": 3},
    )
    points = []
    for method, field in (("sgd", ""), ("sam", ""), ("swp", "beta"), ("sds", "gamma")):
        for value in options.values if field else [None]:
            given = vars(options) | ({field: value} if field else {})
            named = [*arguments, *([f"--{field}"] if field else [])]
            runs = recipe_runs(
                argparse.Namespace(**given), [options.model], [options.data], [method], named
            )
            records = [train(run, options.out, checkpoint_every=5) for run in runs]
            points.append(
                {
                    "method": method,
                    "field": field,
                    "value": value,
                    "title": records[0]["title"] + (f", {field} = {value:g}" if field else ""),
                    "final": [r["final"] for r in records],
                    "images_per_second": (
                        mean(r["images_per_second"] for r in records)
                        if is_steadily_timed(records)
                        else None
                    ),
                    "flops_ratio": mean(r["flops_ratio"] for r in records),
                }
            )
    sam = next(p["images_per_second"] for p in points if p["method"] == "sam")
    rows = [
        [
            p["title"],
            mean_and_error(p["final"]),
            f"{p['flops_ratio']:.3f}",
            *(
                (f"{p['images_per_second']:.0f}", f"{100 * p['images_per_second'] / sam:.0f}%")
                if sam
                else ("", "")
            ),
        ]
        for p in points
    ]
    title = "Figure 3: SWP alone by beta, SDS alone by gamma"
    write_tables(options.out, "fig3", title, COLUMNS, rows)
    write_json(options.out / "fig3.json", {"title": title, "points": points, **provenance()})
    across = [("flops_ratio", "FLOPs of a step / SGD's")]
    across += [("images_per_second", "training images per second")] if sam else []
    figure, axes = panels(len(across), width=5.5)
    for axis, (field, label) in zip(axes, across, strict=True):
        for method, mark, colour, name in (
            ("sgd", "s", "#000000", "base optimizer"),
            ("sam", "D", "#D55E00", "SAM"),
            ("swp", "o-", "#0072B2", "SWP alone, by beta"),
            ("sds", "^-", "#009E73", "SDS alone, by gamma"),
        ):
            chosen = [p for p in points if p["method"] == method]
            x = [p[field] for p in chosen]
            y = [mean(p["final"]) for p in chosen]
            axis.plot(x, y, mark, color=colour, label=name)
            for p, a, b in zip(chosen, x, y, strict=True):
                if p["value"] is not None:
                    axis.annotate(
                        f"{p['value']:g}",
                        (a, b),
                        xytext=(5, 3),
                        textcoords="offset points",
                        fontsize=8,
                    )
        axis.set(xlabel=label, ylabel="final test accuracy (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, options.out / "fig3.png")
