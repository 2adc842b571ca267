"""Table 3: the effect of each strategy alone: SWP, SDS and both, compared with SGD and SAM."""

import argparse
from collections.abc import Sequence

from benchmarks.arguments import method_name
from benchmarks.paper.comparison import compare
from benchmarks.paper.options import parse, recipe_runs

__all__ = ["main"]

METHODS = ["sgd", "sam", "swp", "sds", "esam"]


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", type=method_name, default=METHODS, metavar="NAME")


def main(arguments: Sequence[str] = ()) -> None:
    """Train and compare."""
    options = parse("table3", __doc__, arguments, add=_add, full={"seeds": [0, 1, 2]})
    runs = recipe_runs(options, [options.model], [options.data], options.methods, arguments)
    compare("table3", "Table 3: SWP and SDS, alone and together", runs, options)
