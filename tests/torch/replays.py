"""A chain of blocks, and training it beside a twin whose passes all run the whole model."""

import copy

import torch
from tests.torch.networks import vectors
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Suffix
from esam_torch.prefix import Prefix, verified_replays


class Layer(nn.Module):
    """What the networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return self.dropout(torch.tanh(self.linear(x)))


class Chain(nn.Module):
    """Three blocks and a head; perturbed from `c` on."""

    def __init__(self, make=Layer) -> None:
        super().__init__()
        self.a, self.b, self.c = make(), make(), make()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x))))


def cross_entropies(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def train(model, losses_of=cross_entropies, start="c", **options):
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    optimizer = ESAM(base, model, perturb=Suffix(start), **options)
    losses = losses_of(model)
    return [optimizer.step(losses, *vectors()) for _ in range(3)]


def replays_of(model, monkeypatch, **options):
    """Train beside a twin without a prefix, require equal bits, return how often was replayed."""
    twin = copy.deepcopy(model)
    made = []
    init = Prefix.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            Prefix, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
        )
        with verified_replays():
            reports = train(model, **options)
    with monkeypatch.context() as patch:
        patch.setattr(ESAM, "_prefix", lambda *_: None)
        expected = train(twin, **options)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    state = model.state_dict()
    for name, value in twin.state_dict().items():
        assert torch.equal(state[name], value), name
    for one, other in zip(reports, expected, strict=True):
        assert torch.equal(one.losses, other.losses)
        if other.perturbed_losses is not None:
            assert torch.equal(one.perturbed_losses, other.perturbed_losses)
    return sum(prefix.replayed for prefix in made) / 3
