"""Helpers for tests of directions: a small ESAM, its training, and a step by hand."""

import torch
from tests.torch.scene import batch, losses_of, net, sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import (
    ESAM,
    All,
    Everything,
    Momentum,
    Part,
    Previous,
    Proportional,
    Random,
    TopIncrease,
    TopLoss,
)

SOURCES = (Part(0.25), Previous(), Momentum())
SELECTORS = (All(), TopIncrease(0.5), TopLoss(0.5), Random(0.5), Proportional(0.5))


def make(base=sgd, seed=0, dropout=0.2, **options):
    model = net(seed, dropout=dropout)
    options = {"rho": 0.1, "perturb": Everything(), "gamma": 1.0, **options}
    return model, ESAM(base(model), model, **options), losses_of(model)


def train(model, optimizer, losses, steps=3, seed=0):
    torch.manual_seed(seed)
    for i in range(steps):
        optimizer.zero_grad()
        optimizer.loss(losses, *batch(seed=i)).backward()
        optimizer.step()
    return model


def by_hand(model, losses, direction, given, rho):
    """Return the descent gradient at theta + rho times a normalised direction."""
    start = [p.detach().clone() for p in model.parameters()]
    length = torch.stack([d.norm() for d in direction]).norm()
    with torch.no_grad():
        for p, d in zip(model.parameters(), direction, strict=True):
            p += rho * d / length
    found = torch.autograd.grad(losses(*given).mean(), list(model.parameters()))
    with torch.no_grad():
        for p, s in zip(model.parameters(), start, strict=True):
            p.copy_(s)
    return found


def plain(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    return model, losses


def rows(seed, b=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, 5, generator=generator).double(), torch.arange(b) % 3
