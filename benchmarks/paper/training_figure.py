"""Train runs with a probe, average its measurements over seeds, and write them."""

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

__all__ = ["epoch_means", "perturbing_runs", "train_with_probes", "write_epochs"]


def perturbing_runs(
    options: argparse.Namespace, method: str, arguments: Sequence[str]
) -> list[Run]:
    """Return the runs of a figure about perturbations, one per seed.

    Args:
        options: the command's options.
        method: the method's name.
        arguments: the command line arguments.

    Raises:
        ValueError: the runs perturb nothing.
    """
    runs = recipe_runs(options, [options.model], [options.data], [method], arguments)
    if runs[0].effective_rho == 0:
        raise ValueError(f"the runs must perturb, with rho > 0. Received: {method} with rho = 0.")
    return runs


def train_with_probes(
    runs: Sequence[Run], probe: Callable[[], Probe], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the records of runs, each trained with its own probe.

    Args:
        runs: the runs to train; finished ones are read.
        probe: creates a probe.
        options: the command's options.
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
    """Print and write a table of a few epochs and the verdicts; write all epochs as JSON.

    Args:
        options: the command's options.
        name: the figure's name.
        title: the title of its table.
        values: one value per epoch, by quantity.
        verdicts: the finding for each claim.
        details: additional data for the JSON.
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
