"""The methods that the demo compares."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo.options import Options
from esam_torch import ESAM, All, Bernoulli, Everything, Part, Suffix, TopIncrease

__all__ = ["base", "choices", "losses", "make"]


def choices(options: Options) -> dict[str, dict[str, Any] | None]:
    """Return the keyword arguments of `ESAM` for each method; None for the base optimizer alone."""
    perturb, select = Bernoulli(options.beta), TopIncrease(options.gamma)
    return {
        "SGD": None,
        "SAM": {"perturb": Everything(), "select": All()},
        "ESAM": {"perturb": perturb, "select": select},
        "Suffix, Part": {"perturb": Suffix(0.5), "select": All(), "ascend": Part(0.25)},
    }


def losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return one loss per sample, and the outputs for the accuracy."""
    outputs = model(x)
    return F.cross_entropy(outputs, y, reduction="none"), outputs


def base(model: nn.Module) -> torch.optim.Optimizer:
    """Return the base optimizer, the same for every method."""
    return torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def make(
    model: nn.Module, arguments: dict[str, Any] | None, options: Options
) -> torch.optim.Optimizer:
    """Return a method's optimizer."""
    if arguments is None:
        return base(model)
    return ESAM(base(model), model, rho=options.rho, seed=options.seed, **arguments)
