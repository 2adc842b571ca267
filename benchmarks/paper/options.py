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

#: The defaults of `--quick`: a narrow network on the digits, for a few epochs.
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
    own_data: bool = False,
) -> argparse.Namespace:
    """Return the options of a table or figure.

    Args:
        name: the benchmark's name, such as "fig5".
        description: its description.
        arguments: the command line arguments.
        add: adds its own options.
        full: its own defaults; the command line takes precedence.
        quick: its defaults with --quick, in addition to the common ones.
        check: raises a ValueError if the options are inconsistent; the parser reports it.
        own_data: whether it has its own options for data and models, instead of --data and --model.
    """
    # No abbreviations: given options are looked up by their full name, to override the recipe.
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=description, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a small version that takes seconds")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0], metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / name)
    parser.add_argument(
        "--threads", type=count_number, help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--same-weight-decay",
        action="store_true",
        help="use SGD's weight decay for SAM and ESAM; the paper doubles it on ResNet-18 and WRN",
    )
    add_run_options(
        parser, data=None if own_data else "cifar10", model=None if own_data else "resnet18"
    )
    if add is not None:
        add(parser)
    parser.set_defaults(**(full or {}))
    options = parser.parse_args(arguments)
    if options.quick:
        # The output folder of a quick run is ignored by git: such figures only test the code.
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
    """Return the runs, each with its model's recipe overridden by the command line.

    Args:
        options: the command's options.
        models: keys of `MODELS`.
        data: as in `load_source`.
        methods: names of methods.
        given: the command line arguments, which override the recipe.
    """
    options_given = [argument.partition("=")[0] for argument in given]
    named = {o[2:].replace("-", "_") for o in options_given if o.startswith("--")}
    fields_of_a_run = {field.name for field in fields(Run)}
    asked = {name: value for name, value in vars(options).items() if name in fields_of_a_run}
    data, methods = list(data), list(methods)  # iterated over for each model
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
