"""A step does not search the model for its modules and parameters, which were found before."""

import collections
import copy

import pytest
import torch
from tests.torch.scene import SUFFIX_PART, batch, losses_of, net, sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Momentum, Part, Previous, Random, TopLoss

#: Settings, with the number of walks through the modules that an ordinary step may take. With one
#: sample in a pass, the BatchNorm layers are looked for, once per step.
SETTINGS = {
    "default": ({}, 0),
    "SAM": ({"perturb": Everything(), "gamma": 1.0}, 0),
    "Suffix with Part": (SUFFIX_PART, 0),
    "Part, and losses of all": ({"ascend": Part(0.25), "select": TopLoss(0.5)}, 0),
    "Previous": ({"ascend": Previous()}, 0),
    "Momentum": ({"ascend": Momentum()}, 0),
    "one sample ascends": ({"ascend": Part(0.125), "gamma": 1.0}, 1),
    "one sample ascends, one is scored": ({"ascend": Part(0.875), "select": TopLoss(0.5)}, 1),
    "one sample descends": ({"select": Random(0.125)}, 1),
}


@pytest.fixture
def walks(monkeypatch):
    """Return a counter of walks, by the name of the method."""
    counter = collections.Counter()

    def counted(name):
        own = getattr(nn.Module, name)

        def walk(self, *args, **kwargs):
            counter[name] += 1
            return own(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, walk)

    for name in ("modules", "parameters", "named_parameters", "buffers", "named_buffers"):
        counted(name)
    return counter


@pytest.mark.parametrize("name", SETTINGS)
def test_walks_of_a_step(name, walks):
    options, allowed = SETTINGS[name]
    model = net()
    optimizer = ESAM(sgd(model), model, **{"rho": 0.05, **options})

    def step():
        walks.clear()
        optimizer.zero_grad()
        optimizer.loss(losses_of(model), *batch()).backward()
        optimizer.step()
        return {name: n for name, n in walks.items() if n}

    found = [step() for _ in range(13)]
    assert found[0] and found[1]  # the first steps look at everything, and some later ones
    assert found[-3:] == [{"modules": allowed} if allowed else {}] * 3


def test_a_batch_norm_layer_that_is_added_later_is_found():
    model = net()
    optimizer = ESAM(sgd(model), model, ascend=Part(0.125), gamma=1.0)
    for _ in range(5):
        optimizer.step(losses_of(model), *batch())
    model.hidden = nn.Sequential(model.hidden, nn.BatchNorm1d(6, affine=False))
    optimizer.step(losses_of(model), *batch())
    added = model.hidden[1]
    assert int(added.num_batches_tracked) == 1 and added.training
    assert not torch.equal(added.running_mean, torch.zeros(6))


class Frozen(nn.BatchNorm1d):
    """Normalises by constant statistics, with weights that are trained."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def test_a_batch_norm_layer_that_replaces_another_is_found():
    """It has the same weights, so the optimizer's groups do not change."""
    model = nn.Sequential(nn.Linear(4, 6), Frozen(6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = ESAM(sgd(model), model, **{**SUFFIX_PART, "rho": 1.0})
    data = torch.randn(8, 4) + 1.0, torch.arange(8) % 3

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    for _ in range(5):
        optimizer.step(losses, *data)
    old, model[1] = model[1], nn.BatchNorm1d(6)
    model[1].weight, model[1].bias = old.weight, old.bias
    for step in range(1, 8):
        expected = copy.deepcopy(model)
        expected(data[0])
        optimizer.step(losses, *data)
        assert int(model[1].num_batches_tracked) == step
        assert torch.allclose(model[1].running_mean, expected[1].running_mean)
