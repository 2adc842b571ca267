"""Layers whose backward runs a backward of its own, as reversible layers do (Reformer, RevNet)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Part, Previous, Random, Suffix

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


class Recomputed(torch.autograd.Function):
    """Computes a module again in the backward, which adds to its `.grad`."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None


class Net(nn.Module):
    def __init__(self, *, recomputed):
        super().__init__()
        torch.manual_seed(0)
        self.recomputed = recomputed
        self.stem, self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = Recomputed.apply(x, self.inner) if self.recomputed else self.inner(x)
        return self.head(torch.tanh(x))


SETTINGS = {
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "half of the samples": {"perturb": Everything(), "gamma": 0.5},
    "Part and Random": {"perturb": Everything(), "select": Random(0.5), "ascend": Part(0.5)},
    "Previous": {"perturb": Everything(), "gamma": 0.5, "ascend": Previous()},
    "a base step": {"rho": 0.0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_trains_as_an_ordinary_layer(settings):
    nets = Net(recomputed=True), Net(recomputed=False)
    for net in nets:
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = ESAM(base, net, **{"rho": 0.2, **settings})
        losses = lambda x, y, net=net: F.cross_entropy(net(x), y, reduction="none")  # noqa: E731
        for _ in range(6):  # everything is checked in the first three
            for part in (slice(0, 8), slice(4, 8)):  # accumulated
                optimizer.loss(losses, X[part], Y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["inner", "head"])
def test_masks_save_nothing_from_the_second_step_on(start):
    """If the layer before is not perturbed, the ascent would miss the recomputed one."""
    nets = Net(recomputed=True), Net(recomputed=False)
    for net in nets:
        base = torch.optim.SGD(net.parameters(), lr=0.0)
        optimizer = ESAM(base, net, rho=0.2, perturb=Suffix(start), gamma=1.0, blocks=BLOCKS)
        losses = lambda x, y, net=net: F.cross_entropy(net(x), y, reduction="none")  # noqa: E731
        optimizer.step(losses, X, Y)
        optimizer.zero_grad()
        if net.recomputed:
            with pytest.warns(UserWarning, match="runs a backward of its own"):
                optimizer.step(losses, X, Y)
        else:
            optimizer.step(losses, X, Y)
        assert "inner.weight" in optimizer.report.perturbed or start == "head"
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-6)


BLOCKS = ["stem", "inner", "head"]


def test_base_steps_do_not_warn():
    net = Net(recomputed=True)
    groups = [{"params": list(net.parameters())}]
    optimizer = ESAM(torch.optim.SGD(groups, lr=0.1), net, rho=0.2, perturb=Everything())
    losses = lambda x, y: F.cross_entropy(net(x), y, reduction="none")  # noqa: E731
    optimizer.step(losses, X, Y)
    optimizer.param_groups[0]["esam_rho"] = 0.0
    optimizer.step(losses, X, Y)  # warnings are errors


def test_the_ascent_leaves_gradients_of_others_alone():
    net = Net(recomputed=True)
    optimizer = ESAM(torch.optim.SGD(net.parameters(), lr=0.1), net, rho=0.2, gamma=1.0)
    before = [torch.ones_like(p) for p in net.parameters()]
    for p, g in zip(net.parameters(), before, strict=True):
        p.grad = g
    alone = copy.deepcopy(net)
    calls = []

    def losses(x, y):
        calls.append([p.grad.clone() for p in net.parameters()])
        return F.cross_entropy(net(x), y, reduction="none")

    optimizer.loss(losses, X, Y).backward()
    assert all(torch.equal(g, torch.ones_like(g)) for g in calls[1])  # after the ascent
    assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    assert all(map(torch.equal, net.state_dict().values(), alone.state_dict().values()))
