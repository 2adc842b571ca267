"""Losses that depend on the other samples in a batch, or do not, and a run of steps on them."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 4
Z = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))


def said(losses, *batch, model=None, **options):
    """Return the warning of a run of three steps, or None."""
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 8))
    options = options or {"gamma": 0.5}
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = ESAM(base, model, rho=0.1, perturb=Everything(), **options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(lambda *batch: losses(model, *batch), *batch)
    assert len(found) <= 1
    return str(found[0].message) if found else None


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def info_nce(model, a, b):
    a, b = F.normalize(model(a), dim=1), F.normalize(model(b), dim=1)
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)), reduction="none")


def mixup(model, x, y):
    other = torch.randperm(len(x))
    out = model(0.7 * x + 0.3 * x[other])
    mixed = 0.3 * F.cross_entropy(out, y[other], reduction="none")
    return 0.7 * F.cross_entropy(out, y, reduction="none") + mixed


def noise(model, x, y):
    return cross_entropy(model, x + torch.randn_like(x), y)
