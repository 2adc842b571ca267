"""The options that all tables and figures of the paper share."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import add_run_options
from benchmarks.arguments import count_number, seed_number
from benchmarks.training import Run

__all__ = ["make_run", "parse", "shared_fields"]

#: What `--quick` trains: a narrow network on the digits, for a few epochs.
QUICK = {
    "data": "digits",
    "model": "resnet8",
    "width": 8,
    "epochs": 4,
    "batch": 64,
    "lr": 0.1,
    "seeds": [0],
    "device": "cpu",
    "threads": 1,
}


def parse(
    name: str,
    description: str | None,
    arguments: Sequence[str],
    *,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
    full: dict[str, Any] | None = None,
    quick: dict[str, Any] | None = None,
) -> argparse.Namespace:
    """Return the options of a table or figure.

    Args:
        name: of the benchmark, such as "fig5".
        description: what it is.
        arguments: from the command line.
        add: adds options of its own.
        full: defaults of its own; what stands on the command line precedes them.
        quick: defaults with --quick, on top of the common ones.
    """
    # No abbreviations: what is given is looked up by its whole name, to precede the recipe.
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=description, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a small form, in seconds")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0], metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / name)
    parser.add_argument("--threads", type=count_number, help="of the CPU (default: torch's choice)")
    add_run_options(parser)
    if add is not None:
        add(parser)
    parser.set_defaults(model="resnet18", data="cifar10", **(full or {}))
    options = parser.parse_args(arguments)
    if options.quick:
        # The out folder of a quick run is ignored by git: such figures say only that it runs.
        parser.set_defaults(**{**QUICK, "out": Path("benchmarks/out") / name, **(quick or {})})
        options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def shared_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are fields of a `Run`."""
    names = {field.name for field in fields(Run)}
    return {name: value for name, value in vars(options).items() if name in names}


def make_run(options: argparse.Namespace, method: str, **others: Any) -> Run:
    """Return a run with these options and others in their place."""
    return Run(**{**shared_fields(options), "seed": options.seeds[0], "method": method, **others})
