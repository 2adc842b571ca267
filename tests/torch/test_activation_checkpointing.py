"""Activation checkpointing: without reentrance it works, and with reentrance it is refused."""

import pytest
import torch
from tests.torch.reruns import make, run
from tests.torch.scene import Snapshot, batch, losses_of, net, same
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esam_core import ESAMError
from esam_torch import Batch, Bernoulli, Everything, Only, Part, Previous


class Checkpointed(nn.Module):
    """The small network, with its first part (including BatchNorm) recomputed in the backward."""

    def __init__(self, model, part, **kwargs):
        super().__init__()
        self.model = model
        self.part = part
        self.kwargs = kwargs

    def first(self, x):
        model = self.model
        return model.dropout(F.relu(model.norm(model.conv(x))).mean((2, 3)))

    def second(self, x):
        return self.model.head(torch.tanh(self.model.hidden(x)))

    def forward(self, x):
        first, second = self.first, self.second
        if "first" in self.part:
            first = lambda x: checkpoint(self.first, x, **self.kwargs)  # noqa: E731
        if "second" in self.part:
            second = lambda x: checkpoint(self.second, x, **self.kwargs)  # noqa: E731
        return second(first(x))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("perturb", [Bernoulli(0.6), Everything(), Only("*hidden*")], ids=repr)
@pytest.mark.parametrize("part", ["first", "second", "first and second"])
@pytest.mark.parametrize("ascend", [Batch(), Part(0.25), Previous()], ids=repr)
def test_non_reentrant_checkpointing(part, perturb, gamma, ascend):
    """Recomputed forwards use the weights, noise and statistics of their pass."""
    plain, model = net(), net()
    options = {"perturb": perturb, "gamma": gamma, "ascend": ascend}
    wrapped = Checkpointed(model, "none", use_reentrant=False)
    ours, theirs = make(wrapped, **options), make(plain, **options)
    same(run(ours, 1), run(theirs, 1), "reports")  # with `Previous`, a base step
    wrapped.part = part
    same(run(ours, 3), run(theirs, 3), "reports")
    # torch also updates BatchNorm's statistics in the recomputed forward; ESAM does not.
    same(model.state_dict(), plain.state_dict(), "weights and statistics")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("perturb", [Bernoulli(0.9), Everything(), Only("*hidden*")], ids=repr)
@pytest.mark.parametrize("part", ["second", "first and second"])
def test_reentrant_checkpointing_is_refused_by_name(part, perturb):
    model = Checkpointed(net(), part, use_reentrant=True)
    optimizer = make(model, perturb=perturb)
    x, y = batch()
    x.requires_grad_()
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMError, match=r"reentrant.*use_reentrant=False"):
        optimizer.backward(losses_of(model), x, y)
    before.check()


def test_unused_parameters_are_not_mistaken_for_a_reentrant_checkpoint():
    model = net()
    model.unused = nn.Linear(3, 3)
    optimizer = make(model, perturb=Everything())
    optimizer.step(losses_of(model), *batch())
    assert model.unused.weight.grad is None
