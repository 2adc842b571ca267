"""Steps that perturb nothing, and hyperparameters that are set where no step reads them."""

import warnings

import pytest
import torch
from tests.torch.scene import batch, losses_of, net
from torch import nn

from esam_core import ESAMTypeError
from esam_torch import ESAM, Every, Everything, Only, Suffix


def step(options=None, **settings):
    """Run two steps, and return the warnings."""
    model = net(dropout=0.0)
    groups = [{"params": list(model.parameters()), **(options or {})}]
    optimizer = ESAM(torch.optim.SGD(groups, lr=0.1), model, **settings)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step(losses_of(model), *batch())
    return [str(w.message) for w in found]


@pytest.mark.parametrize("sampler", [Only("embedding"), Every(2, Only("embedding"))], ids=repr)
def test_a_sampler_that_reaches_no_weights_warns_once(sampler):
    (text,) = step(perturb=sampler)
    assert text.startswith("perturb=") and "all steps are base steps so far" in text
    assert "weight" in text and "norm" in text


def test_groups_that_may_not_be_perturbed_warn():
    (text,) = step({"esam_perturb": False}, perturb=Everything())
    assert text.startswith("No weights are trained and may be perturbed: all steps are base steps")


def test_a_suffix_of_frozen_weights_warns():
    model = net(dropout=0.0)
    model.head.requires_grad_(False)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, perturb=Suffix("head"))
    with pytest.warns(UserWarning, match="all steps are base steps so far"):
        optimizer.step(losses_of(model), *batch())


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"perturb": Only("norm")}),
        ({}, {"perturb": Only("embedding"), "rho": 0.0}),
        ({"esam_rho": 0.0}, {"perturb": Only("embedding")}),
        ({"esam_rho": 0.0}, {"perturb": Everything()}),
    ],
)
def test_no_warning_if_something_is_perturbed_or_nothing_should_be(options, settings):
    assert step(options, **settings) == []


@pytest.mark.parametrize(("name", "value"), [("rho", 0.1), ("adaptive", True), ("perturb", False)])
def test_an_option_without_its_prefix_is_refused(name, value):
    with pytest.raises(ESAMTypeError, match=f"`{name}` is not an option.*use `esam_{name}`"):
        step({name: value})
    model = net()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ESAMTypeError, match=f"Received: {name}={value}"):
        optimizer.step(losses_of(model), *batch())
    optimizer.param_groups.clear()
    with pytest.raises(ESAMTypeError, match=f"use `esam_{name}`"):
        optimizer.add_param_group({"params": list(model.parameters()), name: value})


def test_the_base_optimizers_own_rho_is_its_own():
    model = net(dropout=0.0)
    optimizer = ESAM(torch.optim.Adadelta(model.parameters(), rho=0.8), model)
    optimizer.step(losses_of(model), *batch())
    optimizer.param_groups[0]["rho"] = 0.7
    optimizer.step(losses_of(model), *batch())


@pytest.mark.parametrize("name", ["rho", "gamma", "perturb", "ascend", "seed", "take"])
def test_hyperparameters_are_no_attributes(name):
    model = net()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    way_out = "esam_rho" if name == "rho" else "create ESAM again"
    with pytest.raises(AttributeError, match=f"`{name}` cannot be set.*{way_out}.*{name}=0.5"):
        setattr(optimizer, name, 0.5)
    with pytest.raises(AttributeError, match=r"are in `optimizer\.config`"):
        getattr(optimizer, name)
    optimizer.note = "a trainer's own attribute"
    assert optimizer.note.startswith("a trainer")


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * x / x.square().mean(1, keepdim=True).sqrt()


class NormalHead(RMSNorm):
    """Not a normalisation layer, in spite of its name."""


@pytest.mark.parametrize(("layer", "kind"), [(RMSNorm, "norm"), (NormalHead, "weight")])
def test_the_kind_of_a_layers_weights(layer, kind):
    model = nn.Sequential(nn.Linear(4, 3), layer())
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    losses = lambda x: model(x).square().sum(1)  # noqa: E731
    units = optimizer.measured_units(losses, torch.randn(8, 4))
    assert {unit.name: unit.kind for unit in units}["1.scale"] == kind
