"""Train methods with the same schedule over several seeds; write JSON lines and a table.

Finished runs are not repeated, and a killed run resumes from its last checkpoint: the same command
finishes the job. NAME@RHO sets a method's own radius.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.arguments import (
    at_least,
    check_place,
    count_number,
    method_name,
    not_negative,
    partial_share,
    positive,
    seed_number,
    whole_share,
)
from benchmarks.figures import scatter
from benchmarks.methods import METHODS, parse_method
from benchmarks.models import MODELS
from benchmarks.report import mean_and_error, write_tables
from benchmarks.run import Run
from benchmarks.store import Store
from benchmarks.train import train

__all__ = ["accuracy_rows", "add_run_options", "main", "runs_of", "write_accuracy_table"]

# No times: runs are sequential, and the machine may have other work. `speed` interleaves methods.
COLUMNS = ("method", "rho", "norm", "final %", "best %", "FLOPs / SGD")


def add_run_options(
    parser: argparse.ArgumentParser, *, data: str | None = "digits", model: str | None = "resnet20"
) -> None:
    """Add the options that are fields of a `Run`.

    Args:
        parser: the parser.
        data: the default of `--data`; None for no such option.
        model: the default of `--model`; None for no such option.
    """
    run = Run(method="sgd", data="digits", model="resnet20")
    add = parser.add_argument
    if data is not None:
        add(
            "--data",
            default=data,
            help="digits, synthetic, cifar10, cifar100, fashion in "
            f"$ESAM_DATA or ./data, or a folder (default: {data})",
        )
    if model is not None:
        add("--model", default=model, choices=list(MODELS), help=f"(default: {model})")
    add("--width", type=count_number, help="width of the model (default: the published one)")
    add("--epochs", type=count_number, default=run.epochs, help=f"(default: {run.epochs})")
    add("--batch", type=count_number, default=run.batch, help=f"(default: {run.batch})")
    add("--lr", type=positive, default=run.lr, help=f"peak learning rate (default: {run.lr})")
    add("--warmup", type=at_least(0), default=0, help="epochs of linear warm-up (default: 0)")
    add(
        "--weight-decay",
        type=not_negative,
        default=run.weight_decay,
        help=f"(default: {run.weight_decay})",
    )
    add(
        "--sharp-weight-decay",
        type=not_negative,
        help="weight decay of methods other than the base optimizer; the paper doubles it "
        "(default: the same)",
    )
    add(
        "--optimizer", default="sgd", choices=["sgd", "adamw"], help="base optimizer (default: sgd)"
    )
    add("--m", type=count_number, help="samples per perturbation (default: the batch)")
    add("--smoothing", type=partial_share, default=0.0, help="label smoothing (default: 0)")
    add("--rho", type=not_negative, default=run.rho, help=f"(default: {run.rho})")
    add("--beta", type=whole_share, default=run.beta, help=f"(default: {run.beta})")
    add("--gamma", type=whole_share, default=run.gamma, help=f"(default: {run.gamma})")
    add(
        "--ema",
        type=whole_share,
        default=run.ema,
        help=f"averaging rate of sgd-ema (default: {run.ema})",
    )
    add("--images", type=count_number, help="training images, balanced by class (default: all)")
    add("--classes", type=at_least(2), help="number of classes (default: all)")
    add("--first-class", type=at_least(0), default=0, help="the first of these (default: 0)")
    add("--spare", action="store_true", help="also test on the unused training images")
    add("--test-every", type=count_number, default=1, help="epochs between tests (default: 1)")
    add(
        "--size",
        type=count_number,
        help="downscale the images to this size by averaging (default: no)",
    )
    add(
        "--noise",
        type=partial_share,
        default=0.0,
        help="share of wrong training labels (default: 0)",
    )
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="crop and mirror")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: cuda if available)",
    )
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--channels-last", action="store_true", help="memory format")
    add("--compile", action="store_true", help="compile the model's blocks")


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Return the runs of a command, method by method."""
    fields = set(Run.__dataclass_fields__) - {"method", "seed"}
    shared = {name: value for name, value in vars(options).items() if name in fields}
    return [
        Run(method=method, seed=seed, **shared)
        for method in options.methods
        for seed in options.seeds
    ]


def accuracy_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table's rows: one per method, over its seeds."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["run"]["method"], record["rho"], record["norm"] or "")
        groups.setdefault(key, []).append(record)
    rows = []
    for (_, rho, norm), group in groups.items():
        rows.append(
            [
                group[0]["title"],
                f"{rho:g}" if rho else "",
                norm if rho else "",
                mean_and_error([r["final"] for r in group]),
                mean_and_error([r["best"] for r in group]),
                f"{mean(r['flops_ratio'] for r in group):.3f}",
            ]
        )
    return rows


def comparable(records: Iterable[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """Return the records of runs that differ from `run` only in method, rho or seed."""

    def options(other: Run) -> Run:
        return dataclasses.replace(other, method="", rho=0.0, seed=0)

    return [record for record in records if options(Run(**record["run"])) == options(run)]


def write_accuracy_table(folder: Path, run: Run, name: str = "accuracy") -> list[dict[str, Any]]:
    """Print and write the table of a folder's runs; return their records.

    Args:
        folder: the folder of the runs.
        run: only runs that are comparable with it are shown.
        name: the name of the table's file.
    """
    records = comparable(Store(folder).records(), run)
    order = {method: i for i, method in enumerate(METHODS)}
    records.sort(
        key=lambda r: (order[parse_method(r["run"]["method"]).name], r["rho"], r["run"]["seed"])
    )
    if not records:
        return []
    data = records[0]["data"]
    width = "" if run.width is None else f" of width {run.width}"
    note = f" ({data['note']})" if data["note"] else ""
    title = (
        f"{data['name']}{note}, {run.model}{width}, {run.epochs} epochs of batch "
        f"{run.batch}: test accuracy, mean ± standard error (seeds)"
    )
    write_tables(folder, name, title, COLUMNS, accuracy_rows(records))
    _draw(folder / f"{name}.png", title, records)
    return records


def _draw(path: Path, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy against cost, one marker per method."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        rho = f", rho = {record['rho']:g}" if record["rho"] else ""
        groups.setdefault(record["title"] + rho, []).append(record)
    finals = [[r["final"] for r in group] for group in groups.values()]
    errors = [stdev(f) / len(f) ** 0.5 if len(f) > 1 else 0.0 for f in finals]
    scatter(
        path,
        title="\n".join(textwrap.wrap(title, 80)),
        x=("FLOPs of the run / SGD's", [g[0]["flops_ratio"] for g in groups.values()]),
        y=("final test accuracy (%), mean ± standard error", [mean(f) for f in finals]),
        spread=[(mean(f) - e, mean(f) + e) for f, e in zip(finals, errors, strict=True)],
        labels=list(groups),
    )


def main(arguments: Sequence[str] = ()) -> None:
    """Train the runs that the arguments specify, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accuracy",
        description=__doc__,
        epilog="methods: " + "; ".join(f"{m.name}: {m.title}" for m in METHODS.values()),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods", nargs="+", type=method_name, default=["sgd", "sam", "esam"], metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy"))
    parser.add_argument(
        "--checkpoint-every",
        type=count_number,
        default=5,
        help="epochs between checkpoints (default: 5)",
    )
    parser.add_argument(
        "--threads", type=count_number, help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="train only a few epochs on the digits"
    )
    add_run_options(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(
            data="digits",
            model="resnet8",
            width=8,
            epochs=4,
            seeds=[0, 1],
            device="cpu",
            batch=64,
            lr=0.1,
            out=Path("benchmarks/out/accuracy"),
        )
        options = parser.parse_args(arguments)
    runs = runs_of(options)
    if any(Store(options.out).find(run, None) is None for run in runs):
        check_place(parser, options.device, options.data)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for run in runs:
        train(run, options.out, checkpoint_every=options.checkpoint_every)
    write_accuracy_table(options.out, runs[0])
