"""Table 1: CIFAR-10 and CIFAR-100 on three networks: accuracy and speed of SGD, SAM and ESAM."""

import argparse
from collections.abc import Sequence

from benchmarks.arguments import method_name
from benchmarks.models import MODELS
from benchmarks.paper.comparison import compare
from benchmarks.paper.options import parse, recipe_runs

__all__ = ["main"]


def _add(parser: argparse.ArgumentParser) -> None:
    models = ["resnet18", "wrn28-10", "pyramidnet110"]
    parser.add_argument(
        "--models", nargs="+", default=models, choices=list(MODELS), metavar="MODEL"
    )
    parser.add_argument("--sets", nargs="+", default=["cifar10", "cifar100"], metavar="DATA")
    methods = ["sgd", "sam", "esam"]
    parser.add_argument("--methods", nargs="+", type=method_name, default=methods, metavar="NAME")


def main(arguments: Sequence[str] = ()) -> None:
    """Train and compare."""
    options = parse(
        "table1",
        __doc__,
        arguments,
        add=_add,
        full={"seeds": [0, 1, 2]},
        quick={"models": ["resnet8"], "sets": ["digits"], "seeds": [0, 1]},
        own_data=True,
    )
    runs = recipe_runs(options, options.models, options.sets, options.methods, arguments)
    compare("table1", "Table 1: SGD, SAM and ESAM", runs, options)
