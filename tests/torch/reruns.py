"""The same few steps, with and without another way to run the model."""

import torch
from tests.torch.scene import batch, losses_of

from esam_torch import ESAM


def run(optimizer, steps, b=8, losses=None):
    """Train; return the reports."""
    torch.manual_seed(5)
    losses = losses or losses_of(optimizer.model)
    reports = [optimizer.step(losses, *batch(b, seed=seed)) for seed in range(steps)]
    return [(r.losses, r.perturbed_losses, r.indices, r.gradient_norm) for r in reports]


def make(model, **kwargs):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ESAM(base, model, **{"rho": 0.1, "gamma": 0.5, **kwargs})
