"""What a step costs: milliseconds and counted FLOPs, against the base optimizer's step.

Steps of the methods are taken in turn, so that a slow moment of the machine hits all alike; times
are medians, FLOPs means over the masks drawn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models.resnet import ResNet
from esam_torch import ESAM, All, Bernoulli, Everything, Only, Suffix, TopIncrease, TopLoss

#: Keyword arguments of ESAM; None is the base optimizer alone.
METHODS: dict[str, dict[str, Any] | None] = {
    "SGD": None,
    "SAM": {"perturb": Everything(), "select": All()},
    "ESAM, as in the paper": {"perturb": Bernoulli(0.6), "select": TopIncrease(0.5)},
    "SWP alone": {"perturb": Bernoulli(0.6), "select": All()},
    "SDS alone": {"perturb": Everything(), "select": TopIncrease(0.5)},
    "last two stages": {"perturb": Suffix("layer3"), "select": TopIncrease(0.5)},
    "last stage": {"perturb": Suffix("layer4"), "select": TopIncrease(0.5)},
    "last stage, by loss": {"perturb": Suffix("layer4"), "select": TopLoss(0.5)},
    "norm layers of the last two": {
        "perturb": Only("norm", Suffix("layer3")),
        "select": TopIncrease(0.5),
    },
}


def stepper(
    arguments: dict[str, Any] | None, inputs: Tensor, targets: Tensor, width: int
) -> Callable[[], None]:
    """Return a function that takes one training step of a method on a network of its own."""
    torch.manual_seed(0)
    model = ResNet((2, 2, 2, 2), width).to(inputs.device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    def base_step() -> None:
        sgd.zero_grad()
        losses(inputs, targets).mean().backward()
        sgd.step()

    if arguments is None:
        return base_step
    optimizer = ESAM(sgd, model, rho=0.05, **arguments)
    return lambda: optimizer.step(losses, inputs, targets) and None


def measure(
    steps: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Return each method's (median seconds, mean FLOPs) of a step."""
    flops: dict[str, list[int]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # the first lays out the blocks, which no later step does
    for _ in range(repeats):
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            flops[name].append(counter.get_total_flops())
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: (statistics.median(seconds[name]), statistics.mean(flops[name])) for name in steps
    }


def main(arguments: Sequence[str] = ()) -> None:
    """Measure every method and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="samples a step (default: 64)")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18 (default: 16)")
    parser.add_argument("--repeats", type=int, default=10, help="steps a method (default: 10)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(options.batch, 3, 32, 32, generator=generator).to(device)
    targets = torch.randint(10, (options.batch,), generator=generator).to(device)
    steps = {
        name: stepper(method, inputs, targets, options.width) for name, method in METHODS.items()
    }
    measured = measure(steps, options.repeats, device)

    base_seconds, base_flops = measured["SGD"]
    title = f"ResNet-18 of width {options.width}, batch {options.batch}, {device}"
    table = Table(title=title)
    table.add_column("method")
    for column in ("ms a step", "images/s", "time / SGD", "FLOPs / SGD"):
        table.add_column(column, justify="right")
    for name, (seconds, flops) in measured.items():
        table.add_row(
            name,
            f"{1e3 * seconds:.1f}",
            f"{options.batch / seconds:.0f}",
            f"{seconds / base_seconds:.2f}",
            f"{flops / base_flops:.3f}",
        )
    Console().print(table)
