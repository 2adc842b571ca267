"""The demo's command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from esam_core.validation import count_number, nonnegative, open_unit

__all__ = ["Options", "parse"]


@dataclass(frozen=True)
class Options:
    """The demo's options; see `--help`."""

    data: Path | None
    epochs: int
    rho: float
    beta: float
    gamma: float
    seed: int
    device: str
    threads: int
    out: Path


def parse(arguments: list[str] | None = None) -> Options:
    """Return the options, or exit with a message that explains what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Train a small convolutional network with SGD, SAM, the paper's ESAM and "
        "Suffix(0.5) with Part(0.25) from the same initial weights, and compare cost and result.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder that contains cifar-10-batches-py or cifar-100-python, the official python "
        "layout; without it, scikit-learn's handwritten digits",
    )
    parser.add_argument("--epochs", type=int, default=15, help="epochs for each method")
    parser.add_argument("--rho", type=float, default=0.05, help="radius of the perturbation")
    parser.add_argument("--beta", type=float, default=0.6, help="share of the tensors perturbed")
    parser.add_argument("--gamma", type=float, default=0.5, help="share of the samples selected")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and masks")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more rarely help here")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="for the pictures")
    found = parser.parse_args(arguments)
    try:
        nonnegative("rho", found.rho)
        open_unit("beta", found.beta)
        open_unit("gamma", found.gamma)
        count_number("epochs", found.epochs, least=1)
        count_number("threads", found.threads, least=1)
        count_number("seed", found.seed, most=2**63 - 1)
        _check_folder("out", found.out)
        torch.zeros(1, device=found.device)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    return Options(**vars(found))


def _check_folder(name: str, path: Path) -> None:
    """Raise if a path is not a folder and no folder can be created there."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(
            f"`{name}` must be a folder, or a path where one can be created: {nearest} is a file. "
            f"Received: {name}={path}."
        )
