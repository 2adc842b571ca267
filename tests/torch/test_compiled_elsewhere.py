"""Compiled code that ESAM has not been given: `losses` calls a wrapper of the model, or more."""

import warnings

import pytest
import torch
from tests.torch.scene import Snapshot, batch, net, same, sgd
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from esam_core import ESAMRuntimeError
from esam_torch import (
    ESAM,
    Batch,
    Bernoulli,
    Momentum,
    Only,
    Part,
    Previous,
    Proportional,
    Suffix,
    compiling,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:The model or code that `losses` calls is compiled"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Around(nn.Module):
    """A wrapper that a trainer makes, of which ESAM knows nothing."""

    def __init__(self, model):
        super().__init__()
        self.inner = torch.compile(model, backend=aot_eager)

    def forward(self, x):
        return self.inner(x)


def compiled_losses(model):
    values = torch.compile(
        lambda x, y: F.cross_entropy(model(x), y, reduction="none"), backend=aot_eager
    )
    return lambda x, y: 1.0 * values(x, y)


WAYS = {
    "wrapper": lambda model: _losses(Around(model)),
    "function": compiled_losses,
}

OPTIONS = {
    "suffix-part": {"perturb": Suffix("hidden"), "gamma": 1.0, "ascend": Part(0.25)},
    "suffix": {"perturb": Suffix("hidden"), "gamma": 1.0},
    "proportional": {"perturb": Suffix("hidden"), "select": Proportional(0.5)},
    "only": {"perturb": Only("*hidden*"), "gamma": 1.0},
    "paper": {"perturb": Bernoulli(0.6), "gamma": 0.5},
}


def _losses(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def train(model, losses, steps=4, **options):
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1, **options)
    for seed in range(steps):
        optimizer.step(losses, *batch(seed=seed))
    return optimizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_same_as_without_compilation(way, options):
    """In particular, the layers below a suffix are trained."""
    eager, model = net(dropout=0.0), net(dropout=0.0)
    train(eager, _losses(eager), **options)
    train(model, way(model), **options)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_too_many_masks_to_compile_are_noticed():
    """After the first step, the graphs no longer depend on the mask, and a warning says so."""
    model = net(dropout=0.0)
    losses = _losses(Around(model))
    with pytest.warns(UserWarning, match="or code that `losses` calls is compiled, and"):
        optimizer = train(model, losses, perturb=Bernoulli(0.6), gamma=0.5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(4, 12):
            optimizer.step(losses, *batch(seed=seed))


def test_code_compiled_in_a_later_step(monkeypatch):
    """Before torch 2.13, it would be used for all passes; it is refused once, by name."""
    monkeypatch.setattr(compiling, "COMPILED_MODELS_SEE_REQUIRES_GRAD", False)
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer = train(model, _losses(model), **OPTIONS["suffix-part"])
    before, losses = Snapshot(model, optimizer), WAYS["wrapper"](model)
    with pytest.raises(ESAMRuntimeError, match="code that was compiled in a later step"):
        optimizer.step(losses, *batch(seed=4))
    before.check(but=("gradients",))
    optimizer.step(losses, *batch(seed=4))
    train(twin, _losses(twin), steps=5, **OPTIONS["suffix-part"])
    assert all(
        torch.allclose(p, q, atol=1e-5)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("ascend", [Previous(), Momentum()], ids=str)
def test_code_compiled_in_a_later_step_without_an_ascent_pass(ascend, monkeypatch):
    """Only the ascent pass is pruned."""
    monkeypatch.setattr(compiling, "COMPILED_MODELS_SEE_REQUIRES_GRAD", False)
    model = net(dropout=0.0)
    options = {"perturb": Suffix("hidden"), "gamma": 1.0, "ascend": ascend}
    optimizer = ESAM(sgd(model), model, rho=0.1, **options)
    for seed in range(4):
        optimizer.step(_losses(model), *batch(seed=seed))
    assert optimizer.step(WAYS["wrapper"](model), *batch(seed=4)).perturbed


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("ascend", [Batch(), Part(0.5), Previous()], ids=str)
def test_code_compiled_before_the_first_step(called, ascend, monkeypatch):
    """It matters only if `losses` calls it in an ascent pass, which `Previous` has not."""
    monkeypatch.setattr(compiling, "COMPILED_MODELS_SEE_REQUIRES_GRAD", False)
    model, other = net(dropout=0.0), net(dropout=0.0)
    wrapped = Around(model if called else other)
    wrapped(batch()[0])
    options = {"perturb": Suffix("hidden"), "gamma": 1.0, "ascend": ascend}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, _losses(wrapped if called else model), **options)
    said = [w for w in caught if "calls is compiled" in str(w.message)]
    assert len(said) == (called and not isinstance(ascend, Previous))
    eager = net(dropout=0.0)
    train(eager, _losses(eager), **options)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("old", [True, False])
def test_only_old_versions_wait_for_the_first_step(old, monkeypatch):
    monkeypatch.setattr(compiling, "COMPILED_MODELS_SEE_REQUIRES_GRAD", not old)
    model, pruned = net(), []

    def losses(x, y):
        pruned.append(not model.conv.weight.requires_grad)
        return _losses(model)(x, y)

    train(model, losses, steps=3, perturb=Only("*hidden*"), gamma=1.0)
    assert pruned == [not old, False, True, False, True, False]
    eager = net()
    train(eager, _losses(eager), steps=3, perturb=Only("*hidden*"), gamma=1.0)
    same(model.state_dict(), eager.state_dict(), "weights")
