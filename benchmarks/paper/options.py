"""The options that all tables and figures of the paper share."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import add_run_options
from benchmarks.arguments import count_number, seed_number
from benchmarks.recipes import RECIPES
from benchmarks.run import Run

__all__ = ["parse", "recipe_runs"]

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
    check: Callable[[argparse.Namespace], object] | None = None,
) -> argparse.Namespace:
    """Return the options of a table or figure.

    Args:
        name: of the benchmark, such as "fig5".
        description: what it is.
        arguments: from the command line.
        add: adds options of its own.
        full: defaults of its own; what stands on the command line precedes them.
        quick: defaults with --quick, on top of the common ones.
        check: raises a ValueError where the options do not go together; the parser says it.
    """
    # No abbreviations: what is given is looked up by its whole name, to precede the recipe.
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=description, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a small form, in seconds")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0], metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / name)
    parser.add_argument("--threads", type=count_number, help="of the CPU (default: torch's choice)")
    parser.add_argument(
        "--same-weight-decay",
        action="store_true",
        help="give SAM and ESAM SGD's weight decay; the paper doubles it on ResNet-18 and WRN",
    )
    add_run_options(parser)
    if add is not None:
        add(parser)
    parser.set_defaults(model="resnet18", data="cifar10", **(full or {}))
    options = parser.parse_args(arguments)
    if options.quick:
        # The out folder of a quick run is ignored by git: such figures say only that it runs.
        parser.set_defaults(**{**QUICK, "out": Path("benchmarks/out") / name, **(quick or {})})
        options = parser.parse_args(arguments)
    if check is not None:
        try:
            check(options)
        except ValueError as error:
            parser.error(str(error))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def recipe_runs(
    options: argparse.Namespace,
    models: Iterable[str],
    data: Iterable[str],
    methods: Iterable[str],
    given: Sequence[str],
) -> list[Run]:
    """Return the runs, each with its model's recipe under what the command line gives.

    Args:
        options: of the command.
        models: keys of `MODELS`.
        data: as in `load_source`.
        methods: names.
        given: the command line's arguments: what they name precedes the recipe.
    """
    options_given = [argument.partition("=")[0] for argument in given]
    named = {o[2:].replace("-", "_") for o in options_given if o.startswith("--")}
    fields_of_a_run = {field.name for field in fields(Run)}
    asked = {name: value for name, value in vars(options).items() if name in fields_of_a_run}
    data, methods = list(data), list(methods)  # gone through for each model
    runs = []
    for model in models:
        recipe: dict[str, Any] = {}
        if model in RECIPES and not options.quick:
            recipe = RECIPES[model].fields(same_weight_decay=options.same_weight_decay)
        recipe = {name: value for name, value in recipe.items() if name not in named}
        shared = {**asked, **recipe, "model": model}
        runs += [
            Run(**{**shared, "data": name, "method": method, "seed": seed})
            for name in data
            for method in methods
            for seed in options.seeds
        ]
    return runs
