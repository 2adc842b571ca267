"""Weights that are computed from others (torch.nn.utils.parametrize)."""

import copy

import pytest
import torch
from tests.torch.scene import Snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from esam_core import ESAMRuntimeError
from esam_torch import ESAM, Everything


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, perturb=Everything())

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    return model, optimizer, losses, (torch.randn(8, 4), torch.arange(8) % 3)


def test_a_cache_around_a_step_is_refused():
    model, optimizer, losses, data = make()
    before = Snapshot(model)
    with (
        parametrize.cached(),
        pytest.raises(ESAMRuntimeError, match=r"cached\(\)` must not"),
    ):
        optimizer.loss(losses, *data)
    before.check()
    assert optimizer.count == 0


def test_a_cache_within_losses_works():
    model, optimizer, losses, data = make()
    twin = copy.deepcopy(model)
    other = ESAM(torch.optim.SGD(twin.parameters(), lr=0.1), twin, perturb=Everything())

    def cached(x, y):
        with parametrize.cached():
            return losses(x, y)

    optimizer.step(cached, *data)
    other.step(lambda x, y: F.cross_entropy(twin(x), y, reduction="none"), *data)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_cache_is_allowed_without_parametrizations():
    model = nn.Linear(4, 3)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with parametrize.cached():
        optimizer.step(
            lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
            torch.randn(8, 4),
            torch.arange(8) % 3,
        )
    assert optimizer.count == 1
