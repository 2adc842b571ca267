"""Weights that a first forward computes from its batch, as in Glow's ActNorm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Part, Previous, Random, TopLoss

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


class ActNorm(nn.Module):
    """Initialises its shift and its scale from the first batch in training mode."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.ones(8))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x):
        if self.training and not self.initialised:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.scale.copy_(1.0 / x.std(0))
                self.initialised.fill_(True)
        return self.scale * (x + self.shift)


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1.0},
        {"gamma": 0.5},
        {"select": Random(0.5)},
        {"select": TopLoss(0.5)},
        {"gamma": 1.0, "ascend": Previous()},
        {"gamma": 0.5, "ascend": Previous()},
    ],
    ids=str,
)
def test_they_are_those_of_the_whole_batch(settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), ActNorm(), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        expected = -net[0](X).mean(0), 1.0 / net[0](X).std(0)
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = ESAM(base, net, rho=0.1, perturb=Everything(), **settings)
    for _ in range(2):
        optimizer.step(lambda x, y: F.cross_entropy(net(x), y, reduction="none"), X, Y)
        assert torch.equal(net[1].shift, expected[0]) and torch.equal(net[1].scale, expected[1])
        assert net[1].initialised


@pytest.mark.parametrize("settings", [{"gamma": 1.0}, {"gamma": 0.5}, {"select": TopLoss(0.5)}])
def test_with_a_part_they_are_those_of_the_first_forward(settings):
    """The first forward is the one that counts the samples, or the ascent pass on the part."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), ActNorm(), nn.Tanh(), nn.Linear(8, 3))
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = ESAM(base, net, rho=0.1, perturb=Everything(), ascend=Part(0.5), **settings)
    optimizer.step(lambda x, y: F.cross_entropy(net(x), y, reduction="none"), X, Y)
    part = X[optimizer.report.part]
    with torch.no_grad():
        candidates = [-net[0](x).mean(0) for x in (X, part)]
    assert any(torch.equal(net[1].shift, shift) for shift in candidates)
