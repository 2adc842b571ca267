"""`losses` that writes to its batch is refused if later passes would read other values."""

import copy

import pytest
import torch
from tests.torch.scene import batch, net
from torch.nn import functional as F

from esam_core import ESAMRuntimeError
from esam_torch import ESAM, Everything, Part, Random, Suffix

KINDS = {
    "all": {"gamma": 1.0},
    "selected": {"gamma": 0.5},
    "selected at random": {"select": Random(0.5)},
    "ascent on a part": {"gamma": 0.5, "ascend": Part(0.5)},
}


def make(model, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ESAM(optimizer, model, **{"rho": 0.1, "perturb": Everything(), **settings})


def normalising(model):
    return lambda x, y: F.cross_entropy(model(x.sub_(0.5).div_(0.25)), y, reduction="none")


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_batch_that_each_pass_changes_is_refused(settings):
    model = net(dropout=0.0)
    optimizer, (x, y) = make(model, **settings), batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ESAMRuntimeError, match=r"must not change its batch in place.*x\.sub\(mean\)"
    ):
        optimizer.step(normalising(model), x, y)
    assert optimizer.count == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("perturb", [Everything(), Suffix("head")])
def test_a_base_step_has_one_pass_and_may_write(perturb):
    """The batch is written to once, although a sampler of suffixes runs an extra forward first."""
    model, plain = net(dropout=0.0), net(dropout=0.0)
    optimizer, (x, y) = make(model, rho=0.0, perturb=perturb), batch()
    loss = normalising(plain)(x.clone(), y).mean()
    assert torch.equal(optimizer.step(normalising(model), x, y).losses.mean(), loss)
    assert torch.equal(x, batch()[0].sub(0.5).div(0.25))


def test_samples_taken_out_of_the_batch_are_copies():
    """The ascent pass writes to a copy of its samples; only the descent writes to the batch."""
    model, plain = net(dropout=0.0), net(dropout=0.0)
    settings = {"gamma": 1.0, "ascend": Part(0.5)}
    x, y = batch()
    make(model, **settings).step(normalising(model), x.clone(), y)
    make(plain, **settings).step(
        lambda x, y: F.cross_entropy(plain(x.sub(0.5).div(0.25)), y, reduction="none"), x, y
    )
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_writing_the_same_values_again_is_allowed(settings):
    model, plain = net(dropout=0.0), net(dropout=0.0)
    optimizer, other = make(model, **settings), make(plain, **settings)
    x, y = batch()
    x[1, 1, 2] = float("nan")

    def cleaning(x, y):
        x[x.isnan()] = 0.0
        x[:, 0] = x[:, 0].clamp(-1.0, 1.0)
        return F.cross_entropy(model(x), y, reduction="none")

    cleaned = x.nan_to_num(0.0)
    cleaned[:, 0] = cleaned[:, 0].clamp(-1.0, 1.0)
    optimizer.step(cleaning, x, y)
    other.step(lambda x, y: F.cross_entropy(plain(x), y, reduction="none"), cleaned, y)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
