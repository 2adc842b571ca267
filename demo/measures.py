"""Measurements of a step's cost and of a minimum's sharpness."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from demo.methods import choices, losses, make
from demo.options import Options
from esam_core.cost import expected_cost
from esam_torch import ESAM

__all__ = ["RADIUS", "costs", "sharpness"]

#: The distance at which the sharpness of a minimum is measured, the same for all methods.
RADIUS = 0.2
#: Steps over which the FLOPs of random masks are averaged.
COUNTED = 100
#: Timed steps of each method; the first two warm up.
TURNS = 17


def _stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Callable[[], None]:
    """Return a function that runs one training step."""

    def step() -> None:
        if isinstance(optimizer, ESAM):
            optimizer.step(lambda x, y: losses(model, x, y), x, y)
        else:
            optimizer.zero_grad()
            losses(model, x, y)[0].mean().backward()
            optimizer.step()

    return step


def costs(model: nn.Module, x: Tensor, y: Tensor, options: Options) -> dict[str, dict[str, float]]:
    """Return, for each method, a step's seconds, FLOPs relative to SGD's, and predicted FLOPs.

    Steps of the methods are timed alternately, so that slow moments of the machine affect all
    equally, and the medians are reported.
    """
    steps, counted, predicted = {}, {}, {}
    for name, arguments in choices(options).items():
        network = copy.deepcopy(model)
        optimizer = make(network, arguments, options)
        steps[name] = _stepper(network, optimizer, x, y)
        few = _stepper(network, optimizer, x[:8], y[:8])  # enough samples for the ratio
        few()  # the first step finds the blocks, once
        times = COUNTED if name == "ESAM" else 1  # the others' masks are always the same
        with FlopCounterMode(display=False) as counter:
            for _ in range(times):
                few()
        counted[name] = counter.get_total_flops() / times
        predicted[name] = _predicted_cost(network, optimizer, arguments, x[:8], y[:8])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if x.is_cuda:
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "flops": counted[name] / counted["SGD"],
            "predicted": predicted[name],
        }
        for name in steps
    }


def _predicted_cost(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    arguments: dict[str, Any] | None,
    x: Tensor,
    y: Tensor,
) -> float:
    """Return the cost of a step, relative to a base step, according to the cost model."""
    if arguments is None or not isinstance(optimizer, ESAM):
        return 1.0
    units = optimizer.measured_units(lambda x, y: losses(model, x, y), x, y)
    config = optimizer.config
    return expected_cost(
        config.perturb, units, config.select, ascend=config.ascend, steps=COUNTED
    ).ratio


def sharpness(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the increase of the mean training loss at distance RADIUS along its gradient.

    The loss is in evaluation mode. This is the quantity that SAM minimises, measured in the same
    way for all methods. The weights are restored.
    """
    model.eval()
    parameters = list(model.parameters())
    before = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(before, parameters)
    length = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    climbed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, gradient in zip(climbed.parameters(), gradients, strict=True):
            parameter += RADIUS * gradient / length
        return float(F.cross_entropy(climbed(x), y) - before)
