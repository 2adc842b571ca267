"""Counted floating-point operations of a method's steps, against the base optimizer's."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.methods import METHODS, Method, Schedule, make_stepper, parse_method
from benchmarks.models import build

if TYPE_CHECKING:
    from benchmarks.data.source import Source
    from benchmarks.training import Run

__all__ = ["counted_steps", "flops_ratio"]


def counted_steps(
    method: Method,
    *,
    model: str,
    width: int | None = None,
    classes: int = 10,
    shape: tuple[int, int, int] = (3, 32, 32),
    batch: int = 32,
    beta: float = 0.6,
    gamma: float = 0.5,
    repeats: int = 1,
) -> list[int]:
    """Return the FLOPs of each of `repeats` steps of a method, its schedule left out.

    Counted are multiplications and additions of convolutions, matrix products and attention, in
    all passes of the step, by `torch.utils.flop_counter`.

    Args:
        method: which one.
        model: a key of `MODELS`.
        width: of the model.
        classes: number of classes.
        shape: of an image.
        batch: samples a step.
        beta: for random masks.
        gamma: for selectors.
        repeats: how many steps; random masks differ from step to step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(model, classes=classes, channels=shape[0], size=shape[1], width=width)
        x, y = torch.randn(batch, *shape), torch.randint(classes, (batch,))

        def losses(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(network(x), y, reduction="none")

        sgd = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        stepper = make_stepper(
            _unscheduled(method),
            sgd,
            network,
            model_name=model,
            rho=0.01,
            beta=beta,
            gamma=gamma,
            steps=1,
        )
        _lay_out(stepper, losses, x, y)
        counted = []
        for _ in range(repeats):
            with FlopCounterMode(display=False) as counter:
                stepper.step(losses, x, y)
            counted.append(counter.get_total_flops())
    return counted


def _unscheduled(method: Method) -> Method:
    """Return the method as it is on the steps that perturb."""
    from dataclasses import replace

    return replace(method, schedule=Schedule(), rho=None)


def _lay_out(stepper: Any, losses: Any, x: Tensor, y: Tensor) -> None:
    """Take a step that is not counted: the first one may run the model to find its blocks."""
    stepper.step(losses, x, y)


def flops_ratio(run: "Run", source: "Source", steps: int, repeats: int = 20) -> float:
    """Return the FLOPs of a whole run over those of the base optimizer's.

    Args:
        run: the options; its schedule's share of perturbed steps is counted exactly.
        source: the data, for the shape of an image.
        steps: of the run.
        repeats: steps over which random masks are averaged.
    """
    method = parse_method(run.method)
    if method.family == "base":
        return 1.0
    arguments: dict[str, Any] = {
        "model": run.model,
        "width": run.width,
        "classes": source.classes,
        "shape": source.shape,
        "batch": min(32, source.batch),
        "beta": run.beta,
        "gamma": run.gamma,
    }
    (base,) = counted_steps(METHODS["sgd"], **arguments)
    fixed = method.family != "esam" or method.perturb(run.model, 0.6) == method.perturb(
        run.model, 0.3
    )
    count = 1 if fixed and method.name != "random-suffix" else repeats
    counted = counted_steps(method, repeats=count, **arguments)
    share = method.schedule.share(steps)
    return share * sum(counted) / len(counted) / base + (1.0 - share)
