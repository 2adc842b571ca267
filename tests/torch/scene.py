"""Common objects of the tests: a small model, a batch, and a snapshot of all state."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from esam_torch import Part, Suffix

#: The setting that README names first. Its reports have no sharpness.
SUFFIX_PART = {"rho": 0.5, "perturb": Suffix(0.5), "gamma": 1.0, "ascend": Part(0.25)}


class Net(nn.Module):
    """A small network with convolution, BatchNorm, Dropout and a head."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.tanh(self.hidden(self.dropout(x))))


def net(seed: int = 0, **kwargs: Any) -> Net:
    """Return the same network for the same seed."""
    torch.manual_seed(seed)
    return Net(**kwargs)


def batch(b: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, 2, 6, 6, generator=generator), torch.arange(b) % 3


def losses_of(model: nn.Module) -> Callable[..., torch.Tensor]:
    """Return a user's function: one loss per sample."""

    def losses(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(inputs), targets, reduction="none")

    return losses


def sgd(model: nn.Module, **kwargs: Any) -> torch.optim.SGD:
    """Return SGD with momentum over all parameters."""
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **kwargs})


class Snapshot:
    """A copy of weights, gradients, buffers, random state, modes and optimizer state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.taken = self.take()

    def take(self) -> dict[str, Any]:
        """Return copies of everything."""
        model = self.model
        return {
            "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
            "gradients": {
                n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
            },
            "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
            "buffers": {n: b.clone() for n, b in model.named_buffers()},
            "training": {n: m.training for n, m in model.named_modules()},
            "random": torch.get_rng_state(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()) if self.optimizer else None,
        }

    def check(self, *, but: tuple[str, ...] = ()) -> None:
        """Require that everything equals the copy, bit for bit."""
        now = self.take()
        for what, before in self.taken.items():
            if what not in but:
                same(now[what], before, what)


def same(now: Any, before: Any, where: str) -> None:
    """Require that nested tensors and plain values are equal; NaN equals NaN."""
    if isinstance(before, torch.Tensor):
        assert isinstance(now, torch.Tensor), where
        assert now.shape == before.shape and now.dtype == before.dtype, where
        equal = torch.equal(torch.nan_to_num(now), torch.nan_to_num(before))
        assert equal and torch.equal(now.isnan(), before.isnan()), where
    elif isinstance(before, dict):
        assert list(now) == list(before), where
        for key in before:
            same(now[key], before[key], f"{where} {key}")
    elif isinstance(before, list | tuple):
        assert len(now) == len(before), where
        for i, (a, b) in enumerate(zip(now, before, strict=True)):
            same(a, b, f"{where}[{i}]")
    else:
        assert now == before, where
