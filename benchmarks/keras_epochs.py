"""The time of an epoch in Keras: `KERAS_BACKEND=jax python -m benchmarks keras`.

A small convolutional network is trained by `fit` on the backend that `KERAS_BACKEND` names. For
each setting, the first epoch, which compiles, and later epochs are measured in processor time,
relative to SGD's of the same round. The counted cost of a step is that of `esam_core.cost`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import keras
import numpy as np
import torch

import esam_keras
from benchmarks.arguments import count_number
from benchmarks.keras_by_hand import RHO, ByHand
from benchmarks.machine import provenance
from benchmarks.report import write_json, write_tables
from benchmarks.timing import time_interleaved
from esam_core.cost import expected_cost
from esam_keras import ESAM, Proportional, RandomSuffix, Suffix

__all__ = ["BY_HAND", "SETTINGS", "main", "network"]

#: The shares of the network, by cost, that six suffixes contain; all are equally likely.
SIX = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0)

Optimizer = Any


def _sgd() -> Optimizer:
    return keras.optimizers.SGD(0.05, momentum=0.9)


#: The optimizers by the names of their settings; the others are compared with the first.
SETTINGS: dict[str, Callable[[], Optimizer]] = {
    "SGD": _sgd,
    "SAM": lambda: ESAM(_sgd(), rho=RHO, beta=1.0, gamma=1.0),
    "ESAM, the default": lambda: ESAM(_sgd(), rho=RHO),
    "Suffix(0.5), Proportional(0.5)": lambda: ESAM(
        _sgd(), rho=RHO, perturb=Suffix(0.5), select=Proportional(0.5)
    ),
    "RandomSuffix with six masks": lambda: ESAM(
        _sgd(), rho=RHO, perturb=RandomSuffix(SIX, (1 / 6,) * 6), gamma=1.0
    ),
}


#: The name of a control: the passes of the default, written by hand.
BY_HAND = "ESAM's passes by hand"


def network(width: int, size: int, kind: type[keras.Sequential]) -> keras.Model:
    """Return a network of six convolutions for images of size x size pixels."""
    layers = keras.layers
    model = kind([keras.Input((size, size, 3))])
    for i, factor in enumerate((1, 1, 2, 2, 4, 4)):
        strides = 2 if i in (2, 4) else 1
        model.add(layers.Conv2D(factor * width, 3, padding="same", strides=strides))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    return model


class _Training:
    """One setting with its own network; `epoch()` trains it for an epoch."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        keras.utils.set_random_seed(0)
        by_hand = name == BY_HAND
        optimizer = _sgd() if by_hand else SETTINGS[name]()
        self.model = network(options.width, options.size, ByHand if by_hand else keras.Sequential)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(optimizer=optimizer, loss=loss)
        images = options.batch * options.steps
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(images, options.size, options.size, 3)).astype("float32")
        self.y, self.batch = np.arange(images) % 10, options.batch

    def epoch(self) -> None:
        self.model.fit(self.x, self.y, batch_size=self.batch, verbose=0)

    def counted_cost(self) -> float:
        """Return the counted cost of a step in base steps."""
        by_hand = isinstance(self.model, ByHand)
        optimizer = ESAM(_sgd(), rho=RHO, beta=1.0) if by_hand else self.model.optimizer
        if not isinstance(optimizer, ESAM):
            return 1.0
        config, units = optimizer.config, esam_keras.unit_records(self.model)
        return expected_cost(config.perturb, units, config.select, batch_size=self.batch).ratio


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each setting."""
    device = torch.device("cpu")
    names = [*SETTINGS, BY_HAND]
    first: dict[str, list[float]] = {name: [] for name in names}
    trainings: dict[str, _Training] = {}
    for _ in range(options.repeats):
        trainings = {name: _Training(name, options) for name in names}
        epochs = {name: training.epoch for name, training in trainings.items()}
        _, begun = time_interleaved(
            epochs, repeats=1, warmup=0, device=device, clock=time.process_time
        )
        for name, ratio in begun.items():
            first[name].append(ratio.median)
    _, later = time_interleaved(
        epochs, repeats=options.epochs, warmup=1, device=device, clock=time.process_time
    )
    return [
        {
            "setting": name,
            "counted": trainings[name].counted_cost(),
            "later": later[name].median,
            "low": later[name].low,
            "high": later[name].high,
            "first": median(first[name]),
        }
        for name in names
    ]


COLUMNS = ("setting", "counted", "later epochs / SGD", "quartiles", "first epoch / SGD")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks keras", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--width", type=count_number, default=16, help="of the network (16)")
    parser.add_argument("--size", type=count_number, default=16, help="of the images (16)")
    parser.add_argument("--batch", type=count_number, default=64, help="samples per step (64)")
    parser.add_argument("--steps", type=count_number, default=20, help="per epoch (20)")
    parser.add_argument("--epochs", type=count_number, default=15, help="later epochs (15)")
    parser.add_argument("--repeats", type=count_number, default=3, help="first epochs (3)")
    parser.add_argument("--threads", type=count_number, default=1, help="of torch (1)")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/keras-...)")
    parser.add_argument("--quick", action="store_true", help="two steps of a tiny network")
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.size, options.batch = 2, 8, 8
        options.steps = options.epochs = options.repeats = 1
    torch.set_num_threads(options.threads)
    backend = keras.backend.backend()
    root = Path("benchmarks/out" if options.quick else "benchmarks/results")
    out = options.out or root / f"keras-{backend}"
    rows = measure(options)
    shown = [
        [
            row["setting"],
            f"{row['counted']:.2f}",
            f"{row['later']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{row['first']:.2f}",
        ]
        for row in rows
    ]
    title = f"Epochs of Keras {version('keras')} on {backend}: processor time relative to SGD"
    write_tables(out, "keras", title, COLUMNS, shown)
    write_json(out / "keras.json", {"rows": rows, "backend": backend, **provenance()})


if __name__ == "__main__":
    main()
