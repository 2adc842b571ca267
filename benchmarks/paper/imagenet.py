"""Tables 2 and 6: ImageNet's layout, m-sharpness 128: ResNet-50, ResNet-101 and ViT-S/16.

Without a folder in ImageNet's layout (train/ and val/, one folder per class), a small one is
generated next to the results. The loader, the networks and the steps are then real, but the
accuracies are meaningless.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import method_name
from benchmarks.data.folders import write_small_folder
from benchmarks.models import MODELS
from benchmarks.paper.comparison import compare
from benchmarks.paper.options import parse, recipe_runs

__all__ = ["table2", "table6"]


def _table(
    name: str,
    title: str,
    models: Sequence[str],
    arguments: Sequence[str],
    methods: Sequence[str] = ("sgd", "sam", "esam"),
) -> None:
    """Train and compare."""

    def add_own(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--models", nargs="+", default=list(models), choices=list(MODELS), metavar="MODEL")
        shown = list(methods)
        add("--methods", nargs="+", type=method_name, default=shown, metavar="NAME")
        add("--folder", type=Path, help="ImageNet (default: generated images)")

    small = {"size": 32, "width": 24 if "vit-s16" in models else 8, "batch": 16, "m": 8}
    options = parse(
        name,
        __doc__,
        arguments,
        add=add_own,
        full={"size": 224},
        quick={**small, "models": list(models)[:1], "epochs": 1, "lr": 0.01},
        own_data=True,
    )
    # A fixed folder for the generated images: the name of the data is part of a run, and the same
    # command must find its runs again.
    folder = options.folder or write_small_folder(options.out / "generated", train=12, test=6)
    runs = recipe_runs(options, options.models, [str(folder)], options.methods, arguments)
    sizes = sorted({run.m or run.batch for run in runs})
    sharpness = f"m-sharpness {' and '.join(str(size) for size in sizes)}"
    suffix = "" if options.folder else " (generated images: a test of the code only)"
    given = options.folder is not None
    compare(name, f"{title}, {sharpness}{suffix}", runs, options, real=given)


def table2(arguments: Sequence[str] = ()) -> None:
    """ResNet-50 and ResNet-101."""
    models = ("resnet50", "resnet101")
    _table("table2", "Table 2: ImageNet", models, arguments)


def table6(arguments: Sequence[str] = ()) -> None:
    """ViT-S/16."""
    methods = ("sgd", "sam", "swp", "sds", "esam")
    _table("table6", "Table 6: ImageNet, ViT-S/16", ("vit-s16",), arguments, methods)
