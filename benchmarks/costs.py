"""Counted floating-point operations of a method's steps, relative to the base optimizer's.

`torch.utils.flop_counter` counts the multiplications and additions of convolutions, matrix products
and attention in all passes of a step. The steps run on torch's meta device, which computes only
shapes: the counts are those of a real step, at any size.
"""

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.losses import sample_losses
from benchmarks.methods import METHODS, Method, Schedule, make_stepper, parse_method
from benchmarks.models import TEXT_MODELS, build
from esam_core import Unit
from esam_core.budget import make_plan
from esam_core.cost import expected_cost
from esam_torch.blocks import find_blocks
from esam_torch.inspection import parameters_of

if TYPE_CHECKING:
    from benchmarks.data.source import Source
    from benchmarks.run import Run

__all__ = ["counted_steps", "flops_ratio", "predicted_ratio"]


@functools.cache
def counted_steps(
    method: Method,
    *,
    model: str,
    width: int | None = None,
    classes: int = 10,
    shape: tuple[int, int, int] = (3, 32, 32),
    batch: int = 128,
    beta: float = 0.6,
    gamma: float = 0.5,
    repeats: int = 1,
) -> tuple[int, ...]:
    """Return the FLOPs of each of `repeats` steps of a method, without its schedule.

    Args:
        method: the method.
        model: a key of `MODELS`.
        width: the model's width.
        classes: number of classes.
        shape: the shape of an image.
        batch: samples per step.
        beta: for random masks.
        gamma: for selectors.
        repeats: how many steps; random masks differ from step to step.
    """
    network, x, y = _on_meta(model, width, classes, shape, batch)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return sample_losses(network(x), y)

    stepper = make_stepper(
        replace(method, schedule=Schedule(), rho=None),
        torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        network,
        model_name=model,
        rho=0.1,
        beta=beta,
        gamma=gamma,
        steps=1,
    )
    # Not counted: the first step may run the model to find its blocks or the number of samples, and
    # is a base step if there is no ascent direction yet.
    stepper.step(losses, x, y)
    counted = []
    for _ in range(repeats):
        with FlopCounterMode(display=False) as counter:
            stepper.step(losses, x, y)
        counted.append(counter.get_total_flops())
    return tuple(counted)


def _on_meta(
    model: str, width: int | None, classes: int, shape: tuple[int, int, int], batch: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network and a batch without values."""
    with torch.device("meta"):
        network = build(model, classes=classes, channels=shape[0], size=shape[1], width=width)
        if model in TEXT_MODELS:
            symbols = torch.empty(batch, shape[1], dtype=torch.int64)
            return network, symbols, symbols.clone()
        return network, torch.empty(batch, *shape), torch.empty(batch, dtype=torch.int64)


@functools.cache
def _units(
    model: str, width: int | None, classes: int, shape: tuple[int, int, int]
) -> tuple[Unit, ...]:
    """Return the units of a network with their costs."""
    network, x, _ = _on_meta(model, width, classes, shape, 1)
    blocks = find_blocks(network, lambda: network(x), set(map(id, network.parameters())))
    groups = [{"params": list(network.parameters())}]
    return tuple(p.unit for p in parameters_of(network, groups, blocks))


def predicted_ratio(
    method: Method,
    *,
    model: str,
    width: int | None = None,
    classes: int = 10,
    shape: tuple[int, int, int] = (3, 32, 32),
    batch: int = 128,
    beta: float = 0.6,
    gamma: float = 0.5,
) -> float:
    """Return the cost of a step, relative to a base step, according to `esam_core.cost`.

    Args:
        method: the method, without its schedule.
        model: a key of `MODELS`.
        width: the model's width.
        classes: number of classes.
        shape: the shape of an image.
        batch: samples per step.
        beta: for random masks.
        gamma: for selectors.
    """
    if method.family in ("base", "average"):
        return 1.0
    if method.budget is not None:
        plan = make_plan(_units(model, width, classes, shape), method.budget, norm=method.norm)
        return plan.chosen.ratio
    cost = expected_cost(
        method.perturb(model, beta),
        _units(model, width, classes, shape),
        method.select(gamma),
        batch_size=batch,
        norm=method.norm,
        ascend=method.ascend,
    )
    return cost.ratio


def flops_ratio(run: "Run", source: "Source", steps: int, tensors: int) -> float:
    """Return the FLOPs of a whole run divided by those of the base optimizer's run.

    Args:
        run: the run's options; its schedule's share of perturbed steps is exact.
        source: the data, for the shape of an image.
        steps: the number of steps in the run.
        tensors: number of the model's parameter tensors. The more there are, the less random masks
            differ in cost, and the fewer steps are needed for a mean to about a percent.
    """
    method = parse_method(run.method)
    if method.family in ("base", "average"):
        return 1.0
    arguments = {
        "model": run.model,
        "width": run.width,
        "classes": source.classes,
        "shape": source.shape,
        "batch": source.batch if run.m is None else min(run.m, source.batch),
        "beta": run.beta,
        "gamma": run.gamma,
    }
    (base,) = counted_steps(METHODS["sgd"], **arguments)
    if method.random and method.perturb is not METHODS["esam"].perturb:
        # Suffixes of different lengths differ too much in cost for a mean over few steps.
        average = predicted_ratio(method, **arguments)
    else:
        repeats = max(3, 300 // tensors) if method.random else 1
        counted = counted_steps(method, repeats=repeats, **arguments)
        average = sum(counted) / len(counted) / base
    share = method.schedule.share(steps)
    return share * average + (1.0 - share)
