"""Train methods over data sets, models and seeds, and compare the results with the paper's."""

import argparse
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from benchmarks.figures import COLOURS, panels, save
from benchmarks.machine import provenance
from benchmarks.published import published
from benchmarks.report import mean_and_error, write_json, write_tables
from benchmarks.run import Run
from benchmarks.train import train

__all__ = ["compare", "is_steadily_timed"]

COLUMNS = (
    *("data, model, method", "final %", "best %", "the paper's best %", "images/s"),
    *("the paper's", "% of SAM's speed", "the paper's", "FLOPs / SGD"),
)


def is_steadily_timed(records: Iterable[dict[str, Any]]) -> bool:
    """Return whether the images per second of sequential runs can be compared.

    They can on a GPU used by one process, and on a CPU if measured in the process's own time, which
    excludes other work on the machine, with one thread: it is the sum over threads. Older records
    have a CPU's wall time, which includes other work.
    """
    return all(
        record["machine"]["accelerator"] is not None
        or (record.get("clock") == "processor time" and record["machine"]["threads"] == 1)
        for record in records
    )


def compare(
    name: str,
    title: str,
    runs: Sequence[Run],
    options: argparse.Namespace,
    *,
    real: bool = True,
) -> None:
    """Train the runs; write a JSON for each and one for all, the table and the figure.

    Args:
        name: the benchmark's name.
        title: the title of its table and figure.
        runs: the runs to train; finished ones are read.
        options: the command's options.
        real: whether the data are the paper's. Its figures are shown only beside runs on all of
            them, at full size.
    """
    records = [train(run, options.out, checkpoint_every=5) for run in runs]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["data"]["name"], record["run"]["model"], record["run"]["method"])
        groups.setdefault(key, []).append(record)
    rows, cells = [], []
    timed = is_steadily_timed(records)
    for (data, model, method), group in groups.items():
        speed = mean(r["images_per_second"] for r in group) if timed else None
        sam = groups.get((data, model, "sam"))
        relative = None
        if speed is not None and sam is not None:
            relative = speed / mean(r["images_per_second"] for r in sam)
        whole = real and not group[0]["data"]["note"]
        paper = published(name, data, model, method) if whole else None
        paper_sam = published(name, data, model, "sam")
        their_speed = ""
        if paper is not None and paper_sam is not None:
            their_speed = f"{100 * paper.images_per_second / paper_sam.images_per_second:.0f}%"
        finals, bests = [r["final"] for r in group], [r["best"] for r in group]
        rows.append(
            [
                f"{data}, {model}, {group[0]['title']}",
                mean_and_error(finals),
                mean_and_error(bests),
                str(paper or ""),
                "" if speed is None else f"{speed:.0f}",
                "" if paper is None else f"{paper.images_per_second}",
                "" if relative is None else f"{100 * relative:.0f}%",
                their_speed,
                f"{mean(r['flops_ratio'] for r in group):.3f}",
            ]
        )
        cells.append(
            {
                "data": data,
                "model": model,
                "method": method,
                "title": group[0]["title"],
                "final": finals,
                "best": bests,
                "images_per_second": speed,
                "relative_speed": relative,
                "flops_ratio": mean(r["flops_ratio"] for r in group),
                "paper_accuracy": None if paper is None else paper.accuracy,
            }
        )
    write_tables(options.out, name, title, COLUMNS, rows)
    write_json(options.out / f"{name}.json", {"title": title, "cells": cells, **provenance()})
    _draw(options, name, title, cells)


def _draw(
    options: argparse.Namespace, name: str, title: str, cells: Sequence[dict[str, Any]]
) -> None:
    """Draw accuracy against speed or FLOPs, one panel per data set and model."""
    timed = all(c["images_per_second"] is not None for c in cells)
    x = "images_per_second" if timed else "flops_ratio"
    places = list(dict.fromkeys((c["data"], c["model"]) for c in cells))
    figure, axes = panels(len(places), width=5.5)
    for axis, (data, model) in zip(axes, places, strict=True):
        chosen = [c for c in cells if (c["data"], c["model"]) == (data, model)]
        for i, cell in enumerate(chosen):
            n = len(cell["final"])
            colour = COLOURS[i % len(COLOURS)]
            axis.plot(
                *([cell[x]] * n, cell["final"]),
                *("o",),
                color=colour,
                label=cell["title"],
                alpha=0.8,
            )
            if cell["paper_accuracy"] is not None:
                axis.axhline(
                    cell["paper_accuracy"],
                    color=colour,
                    linestyle=":",
                    label=f"{cell['title']}: the paper's best accuracy",
                )
        label = "training images per second" if timed else "FLOPs of the run / SGD's"
        axis.set(title=f"{data}, {model}", xlabel=label)
        axis.set_ylabel("final test accuracy (%), one marker per seed")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    save(figure, options.out / f"{name}.png")
