"""The blocks are measured once per run: a resumed one perturbs what the run before did."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Part, Suffix
from esam_torch.inspection import parameters_of

OPTIONS = {"perturb": Suffix(0.5), "gamma": 1.0}


def network():
    """Return a network whose convolutions cost much on large images, and little on small ones."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 256), nn.ReLU()]
    return nn.Sequential(*stem, *head, nn.Linear(256, 2))


def images(size):
    torch.manual_seed(size)
    return torch.randn(8, 3, size, size), torch.arange(8) % 2


def make(**options):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ESAM(base, model, rho=0.2, **{**OPTIONS, **options})


def step(optimizer, size):
    def losses(x, y):
        return F.cross_entropy(optimizer.model(x), y, reduction="none")

    return optimizer.step(losses, *images(size)).perturbed


def test_the_suffix_depends_on_the_first_batch():
    assert step(make(), 4) != step(make(), 32)


def saved_and_loaded(optimizer):
    """Resume in a new process: the state is data."""
    other = make()
    other.model.load_state_dict(optimizer.model.state_dict())
    state = optimizer.state_dict()
    state["esam"] = json.loads(json.dumps(state["esam"]))
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("kind", ["names", "modules"])
def test_chosen_blocks_are_kept(kind):
    def chosen():
        model = network()
        blocks = ["0", "2", "6", "8"]
        if kind == "modules":
            blocks = [model.get_submodule(name) for name in blocks]
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return ESAM(base, model, rho=0.2, blocks=blocks, **OPTIONS)

    whole, resumed = chosen(), chosen()
    step(whole, 4)
    resumed.load_state_dict(whole.state_dict())
    assert step(resumed, 32) == step(whole, 32)
    assert step(chosen(), 32) != step(whole, 32)


@pytest.mark.parametrize(
    "again",
    [saved_and_loaded, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["checkpoint", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("first", [4, 32])
def test_another_first_batch_has_the_same_suffix(again, first):
    whole, before = make(), make()
    for optimizer in (whole, before):
        step(optimizer, first)
    resumed = again(before)
    for size in (36 - first, first):
        assert step(resumed, size) == step(whole, size)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_wrapper_is_the_same_model():
    optimizer = make()
    found = step(optimizer, 4)
    optimizer.model = torch.compile(optimizer.model, backend="eager")
    assert step(optimizer, 32) == found


def test_chosen_blocks():
    names = ["0", "2", "6", "8"]
    optimizer = make(blocks=names)
    found = step(optimizer, 4)
    other = make(blocks=names)
    other.load_state_dict(optimizer.state_dict())
    assert step(other, 32) == found
    other = make(blocks=["0", "6"])  # others are measured
    other.load_state_dict(optimizer.state_dict())
    assert step(other, 32) != found


def test_other_trained_weights_are_measured():
    model = network()
    optimizer = ESAM(torch.optim.SGD(model[6:].parameters(), lr=0.1), model, **OPTIONS)
    step(optimizer, 4)
    optimizer.add_param_group({"params": list(model[:3].parameters())})
    assert step(optimizer, 32)[0] == "6.weight"


def test_a_state_of_another_model_is_measured():
    optimizer, model = make(), network()
    step(optimizer, 4)
    model[6] = nn.Linear(128, 300)
    model[8] = nn.Linear(300, 2)
    other = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.2, **OPTIONS)
    state = {**other.state_dict(), "esam": optimizer.state_dict()["esam"]}
    other.load_state_dict(state)
    assert step(other, 32)[0] == "6.weight"


def test_measured_units_are_those_of_the_given_batch():
    optimizer = make()
    step(optimizer, 4)
    costs = [
        sum(u.cost for u in optimizer.measured_units(_losses(optimizer), *images(size)))
        for size in (4, 32)
    ]
    assert costs[0] < costs[1]
    assert step(optimizer, 32) == step(optimizer, 4)


def _losses(optimizer):
    return lambda x, y: F.cross_entropy(optimizer.model(x), y, reduction="none")


def test_a_spent_budget_keeps_its_blocks():
    optimizer = make(perturb=None, gamma=None, budget=1.4, ascend=Part(0.25))
    found = step(optimizer, 4)
    other = make(perturb=None, gamma=None, budget=1.4, ascend=Part(0.25))
    other.load_state_dict(optimizer.state_dict())
    assert step(other, 32) == found
    names = [p.unit.name for p in parameters_of(other.model, other.param_groups)]
    assert set(found) <= set(names)
