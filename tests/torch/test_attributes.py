"""Attributes and hooks of modules that change between a loss and its backward."""

import contextlib

import pytest
import torch
from tests.torch.scene import Snapshot, batch, net, sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Part, Previous, Suffix

SETTINGS = {
    "default": {},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "Suffix with Part": {"perturb": Suffix(0.5), "gamma": 1.0, "ascend": Part(0.25)},
    "Previous": {"ascend": Previous(), "gamma": 1.0},
}
X, Y = batch()
X = X.flatten(1)


class Tasks(nn.Module):
    """A model with two heads; attributes choose one and scale it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(72, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
        self.task = "a"
        self.factors = {"a": 1.0, "b": 2.0}
        self.calls = 0
        self.hidden = torch.zeros(6)

    def forward(self, x, task=None):
        task = task or self.task
        self.calls += 1
        features = torch.tanh(self.body(x) + 0.1 * self.hidden)
        self.hidden = features.mean(0)
        return self.heads[task](features) * self.factors[task] * self.by

    by = 1.0

    @contextlib.contextmanager
    def doubled(self):
        self.by = 2.0
        try:
            yield
        finally:
            del self.by


def make(**settings):
    model = Tasks()
    optimizer = ESAM(sgd(model), model, **{"rho": 0.1, "perturb": Everything(), **settings})
    return model, optimizer, lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def same_gradients(model, twin):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        torch.testing.assert_close(p.grad, q.grad)
        p.grad = q.grad = None


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_attribute_per_loss_and_one_backward_for_the_sum(settings):
    """It is found in the first step, and remembered in the steps that do not search."""
    model, optimizer, losses = make(**settings)
    twin, other, _ = make(**settings)

    def of_task(x, y, task):
        return F.cross_entropy(twin(x, task), y, reduction="none")

    for _ in range(6):
        total = twins_total = 0.0
        for task in "ab":
            model.task = task
            model.hidden, twin.hidden = torch.zeros(6), torch.zeros(6)
            total = total + optimizer.loss(losses, X, Y)
            twins_total = twins_total + other.loss(of_task, X, Y, task)
        total.backward()
        twins_total.backward()
        assert model.task == "b"
        same_gradients(model, twin)
        optimizer.step()
        other.step()


def doubling(_module, _args, output):
    return output * 2.0


CHANGES = {
    "a value": lambda model: setattr(model, "task", "b"),
    "in a container": lambda model: model.factors.update(a=3.0),
    "a new attribute": lambda model: setattr(model, "by", 3.0),
    "a new hook": lambda model: model.body.register_forward_hook(doubling),
    "hooks removed": lambda model: model.heads["b"]._forward_hooks.clear(),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_loss_concern_no_pass_and_remain(change, settings):
    model, optimizer, losses = make(**settings)
    twin, other, twins_losses = make(**settings)
    for module in (model, twin):
        module.heads["b"].register_forward_hook(doubling)
        module.task = "b" if change == "hooks removed" else "a"
    mean = optimizer.loss(losses, X, Y)
    CHANGES[change](model)
    mean.backward()
    other.loss(twins_losses, X, Y).backward()
    same_gradients(model, twin)
    CHANGES[change](twin)
    for one, two in zip(model.modules(), twin.modules(), strict=True):
        assert len(one._forward_hooks) == len(two._forward_hooks)
    assert {**vars(model), "_modules": 0, "hidden": 0} == {
        **vars(twin),
        "_modules": 0,
        "hidden": 0,
    }


class Swapped(nn.Module):
    """A model whose head and mask are replaced for each task."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(72, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})
        self.head = self.heads["a"]
        self.register_buffer("mask", torch.ones(6))

    def choose(self, task):
        self.head = self.heads[task]
        self.mask = torch.arange(6.0) if task == "b" else torch.ones(6)
        return self

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)) * self.mask)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_submodule_and_a_buffer_per_loss_and_one_backward_for_the_sum(settings):
    model, twin = Swapped(), Swapped()
    optimizer, other = (
        ESAM(sgd(m), m, **{"rho": 0.1, "perturb": Everything(), **settings}) for m in (model, twin)
    )

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def of_task(x, y, task):
        return F.cross_entropy(twin.choose(task)(x), y, reduction="none")

    for _ in range(6):
        total = twins_total = 0.0
        for task in "ab":
            model.choose(task)
            total = total + optimizer.loss(losses, X, Y)
            twins_total = twins_total + other.loss(of_task, X, Y, task)
        given = model.mask
        total.backward()
        twins_total.backward()
        assert model.head is model.heads["b"] and model.mask is given
        same_gradients(model, twin)
        optimizer.step()
        other.step()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_context_around_the_loss_only(settings):
    """As with PEFT's `disable_adapter()`."""
    model, optimizer, losses = make(**settings)
    twin, other, twins_losses = make(**settings)
    with model.doubled():
        mean = optimizer.loss(losses, X, Y)
    mean.backward()
    with twin.doubled():
        other.loss(twins_losses, X, Y).backward()
    same_gradients(model, twin)
    assert "by" not in vars(model)


def test_after_an_error_the_attributes_are_those_of_the_user():
    model, optimizer, losses = make()
    seen = []

    def failing(x, y):
        seen.append(model.task)
        return losses(x, y) if len(seen) < 4 else 1 / 0  # two calls compare the losses

    mean = optimizer.loss(failing, X, Y)
    before = Snapshot(model)
    model.task = "b"
    with pytest.raises(ZeroDivisionError):
        mean.backward()
    assert seen == ["a"] * 4 and model.task == "b"
    before.check()


def test_state_that_a_forward_writes_is_not_an_attribute_of_the_user():
    """Truncated backpropagation through time: the state is detached before the backward."""
    model, optimizer, losses = make(gamma=1.0)
    twin, other, twins_losses = make(gamma=1.0)
    for _ in range(5):
        mean = optimizer.loss(losses, X, Y)
        model.hidden = model.hidden.detach()
        mean.backward()
        other.loss(twins_losses, X, Y).backward()
        twin.hidden = twin.hidden.detach()
        same_gradients(model, twin)
        assert torch.equal(model.hidden, twin.hidden) and model.calls == twin.calls


def test_what_a_trainer_notes_about_its_own_hooks_remains_true():
    """Lightning decides by it what may be logged: not the losses at the perturbed weights."""
    model, seen = net(dropout=0.0), []

    def losses(x, y):
        seen.append(model._current_fx_name)
        return F.cross_entropy(model(x), y, reduction="none")

    model._current_fx_name = "training_step"
    mean = ESAM(sgd(model), model, rho=0.1, gamma=1.0).loss(losses, *batch())
    model._current_fx_name = "backward"
    mean.backward()
    assert seen == ["training_step", "backward"]
