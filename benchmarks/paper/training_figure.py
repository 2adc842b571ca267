"""Train runs with a probe, average what it measured over seeds, and write it down."""

import argparse
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from benchmarks.machine import provenance
from benchmarks.paper.options import recipe_runs
from benchmarks.report import write_json, write_tables
from benchmarks.run import Run
from benchmarks.train import train
from benchmarks.training import Probe

__all__ = ["epoch_means", "perturbing_runs", "probed", "write_epochs"]


def perturbing_runs(
    options: argparse.Namespace, method: str, arguments: Sequence[str]
) -> list[Run]:
    """Return the runs of a figure that looks at perturbations: one for each seed.

    Args:
        options: of the command.
        method: its name.
        arguments: from the command line.

    Raises:
        ValueError: the runs perturb nothing.
    """
    runs = recipe_runs(options, [options.model], [options.data], [method], arguments)
    if runs[0].effective_rho == 0:
        raise ValueError(f"the runs must perturb, with rho > 0. Received: {method} with rho = 0.")
    return runs


def probed(
    runs: Sequence[Run], probe: Callable[[], Probe], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the records of runs, each trained with a probe of its own.

    Args:
        runs: what to train; those that are done are read.
        probe: makes one.
        options: of the command.
    """
    return [train(run, options.out, checkpoint_every=5, probe=probe()) for run in runs]


def epoch_means(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Return each quantity by epoch, averaged over the records."""
    histories = [record["history"] for record in records]
    return {
        name: [mean(row[name] for row in rows) for rows in zip(*histories, strict=True)]
        for name in names
    }


def write_epochs(
    options: argparse.Namespace,
    name: str,
    title: str,
    values: dict[str, list[float]],
    verdicts: dict[str, str],
    *,
    details: dict[str, Any] | None = None,
) -> None:
    """Print and write a table of a few epochs, all of them as JSON, and the verdicts.

    Args:
        options: of the command.
        name: of the figure.
        title: of its table.
        values: by quantity, one an epoch.
        verdicts: what was found of each claim.
        details: more for the JSON.
    """
    epochs = len(next(iter(values.values())))
    shown = sorted(
        {round(i * (epochs - 1) / min(9, max(1, epochs - 1))) for i in range(10)}
        & set(range(epochs))
    )
    columns = ("epoch", *values)
    rows = [[str(i + 1), *(f"{v[i]:.4g}" for v in values.values())] for i in shown]
    write_tables(options.out, name, title, columns, rows)
    for claim, verdict in verdicts.items():
        print(f"{claim}: {verdict}")
    with (options.out / f"{name}.md").open("a", encoding="utf-8") as file:
        file.writelines(f"\n- {claim}: {verdict}" for claim, verdict in verdicts.items())
        file.write("\n")
    write_json(
        options.out / f"{name}.json",
        {
            "title": title,
            "by_epoch": values,
            "verdicts": verdicts,
            **(details or {}),
            **provenance(),
        },
    )
