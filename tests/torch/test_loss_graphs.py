"""Losses that depend on other tensors, on terms that a forward keeps, or on few weights."""

import copy
import warnings

import pytest
import torch
from tests.torch.scene import Snapshot, batch, sgd
from tests.torch.steps import close, gradients, make
from torch import nn
from torch.nn import functional as F

from esam_core import ESAMRuntimeError, ESAMValueError
from esam_torch import ESAM, Only, Part, Previous, Random, Suffix, TopLoss


def test_values_computed_outside_losses_are_refused():
    model, optimizer, _ = make(beta=1.0, gamma=1.0)

    def head(features, y):
        return F.cross_entropy(model.head(features), y, reduction="none")

    x, y = batch()
    features = torch.tanh(model.hidden(F.relu(model.norm(model.conv(x))).mean((2, 3))))
    with pytest.raises(ESAMRuntimeError, match="Compute it inside `losses`"):
        optimizer.loss(head, features, y)
    loss = optimizer.loss(lambda y: head(features, y), y)
    with pytest.raises(ESAMRuntimeError, match="Compute it inside `losses`"):
        loss.backward()
    optimizer.loss(head, features.detach(), y).backward()


@pytest.mark.parametrize("options", [{}, {"rho": 0.0}], ids=["esam", "base"])
def test_gradients_of_tensors_outside_the_model(options):
    """A batch, a temperature, a generator's images: as in any backward."""
    model, optimizer, _ = make(gamma=0.5, beta=1.0, **options)
    model.dropout.p = 0.0
    x, y = batch()
    x.requires_grad_()
    shift = torch.zeros(1, requires_grad=True)
    temperature = torch.ones(1, requires_grad=True)

    def warm(x, y):
        return F.cross_entropy(model(x) / temperature, y, reduction="none")

    optimizer.loss(warm, x + shift, y).backward()
    indices = optimizer.report.indices
    chosen = range(len(x)) if indices is None else indices.tolist()
    rows = [i for i in range(len(x)) if x.grad[i].any()]
    assert rows == list(chosen)
    torch.testing.assert_close(shift.grad[0], x.grad.sum())
    assert temperature.grad is not None and temperature.grad.abs() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.5},
        {"select": TopLoss(0.5)},
        {"gamma": 1.0, "ascend": Part(0.5)},
        {"gamma": 0.5, "ascend": Part(0.5)},
        {"gamma": 0.5, "ascend": Previous()},
    ],
    ids=str,
)
def test_derivatives_with_respect_to_an_input_that_requires_a_gradient(options):
    """As in physics-informed networks: rows of the input require a gradient in every pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = ESAM(sgd(model), model, rho=0.1, beta=1.0, **options)

    def losses(x):
        with torch.enable_grad():
            u = model(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope + u).square()[:, 0]

    for _ in range(2):
        optimizer.step(losses, torch.linspace(0.0, 1.0, 8)[:, None].requires_grad_())


@pytest.mark.parametrize("options", [{}, {"beta": 1.0, "gamma": 1.0}, {"ascend": Previous()}])
def test_other_leaves_get_their_gradient_in_every_step(options):
    """A perturbation of the inputs that each step creates; a temperature that is used late."""
    model, optimizer, _ = make(**options)
    temperature = torch.ones(1, requires_grad=True)
    for step in range(7):
        (x, y), delta = batch(seed=step), torch.zeros(2, 6, 6, requires_grad=True)
        scale = temperature if step == 6 else 1.0

        def losses(x, y, delta=delta, scale=scale):
            return F.cross_entropy(model(x + delta) / scale, y, reduction="none")

        optimizer.zero_grad()
        optimizer.loss(losses, x, y).backward()
        optimizer.step()
        assert delta.grad is not None and delta.grad.abs().max() > 1e-4
        assert (temperature.grad is not None) == (step == 6)


class Keeping(nn.Module):
    """A network that keeps an auxiliary loss, features, or features without a graph."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.trunk, self.aux, self.head = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        features = torch.tanh(self.trunk(x))
        if self.kept == "loss":
            self.early = self.aux(features).square().mean()
        elif self.kept == "in a list":
            self.early = [self.aux(features), None]
        else:
            self.early = features.detach()
        return self.head(features)


@pytest.mark.parametrize("kept", ["loss", "in a list", "detached"])
def test_a_term_that_the_forward_keeps_has_its_gradient(kept):
    """After the first step, which sees that there is a graph; a warning says so."""
    torch.manual_seed(0)
    model, (x, y) = Keeping(kept), (torch.randn(8, 4), torch.randint(3, (8,)))
    optimizer = ESAM(sgd(model), model, perturb=Suffix("head"), gamma=1.0)
    losses = lambda x, y: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    optimizer.step(losses, x, y)
    for step in range(3):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = optimizer.loss(losses, x, y)
        assert len(caught) == (step == 0 and kept != "detached")
        assert not caught or "detach or delete them there" in str(caught[0].message)
        if kept == "detached":
            loss.backward()
            continue
        term = model.early if kept == "loss" else model.early[0].square().mean()
        wanted = torch.autograd.grad(term, list(model.aux.parameters()), retain_graph=True)
        (loss + term).backward()
        for parameter, gradient in zip(model.aux.parameters(), wanted, strict=True):
            assert torch.equal(parameter.grad, gradient)
        optimizer.step()


class Tasks(nn.Module):
    """A trunk with two heads."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x, task):
        return getattr(self, task)(torch.tanh(self.trunk(x)))


def tasks(**options):
    torch.manual_seed(0)
    model = Tasks()
    return model, ESAM(sgd(model), model, rho=0.5, **options)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_batch_that_uses_no_perturbed_unit_gives_the_ordinary_gradient(gamma):
    model, optimizer = tasks(perturb=Only("b.*"), select=Random(gamma))
    torch.manual_seed(1)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    report = optimizer.backward(
        lambda x, y: F.cross_entropy(model(x, "a"), y, reduction="none"), x, y
    )
    assert float(report.perturbation_norm) == float(report.gradient_norm) == 0.0
    chosen = slice(None) if gamma == 1.0 else report.indices
    plain = copy.deepcopy(model)
    plain.zero_grad()
    F.cross_entropy(plain(x[chosen], "a"), y[chosen]).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_a_model_whose_batches_use_different_parts_trains():
    """Some masks of the default perturb only the head of the other task."""
    model, optimizer = tasks()
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    norms = []
    for step in range(80):
        task = "ab"[step % 2]
        report = optimizer.step(
            lambda x, y, task=task: F.cross_entropy(model(x, task), y, reduction="none"), x, y
        )
        norms.append(float(report.perturbation_norm))
    assert 0.0 in norms and max(norms) > 0.5
    assert report.loss < 0.5


def test_a_selection_without_a_graph_gives_zeros():
    """A constant loss for images without objects: the others use the parameters."""
    model, optimizer = tasks(beta=1.0, select=TopLoss(0.5))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def losses(x, y, empty):
        if empty.all():
            return torch.full((len(x),), 9.0)
        return torch.where(empty, 9.0, F.cross_entropy(model(x, "a"), y, reduction="none"))

    empty = torch.arange(8) < 4
    before = copy.deepcopy(model.state_dict())
    report = optimizer.backward(losses, x, y, empty)
    assert report.indices.tolist() == [0, 1, 2, 3]
    for name, parameter in model.named_parameters():
        used = not name.startswith("b.")
        assert (parameter.grad is not None) == used
        assert not used or not parameter.grad.any()
        assert torch.equal(parameter, before[name])
    never = torch.ones(8, dtype=torch.bool)
    with pytest.raises(ESAMValueError, match="`losses` must depend on the model's parameters"):
        optimizer.backward(losses, x, y, never)


@pytest.mark.parametrize("options", [{"perturb": Suffix("b")}, {"ascend": Part(0.5), "beta": 1.0}])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_losses_without_parameters_are_refused_also_in_part(options, gamma):
    model, optimizer = tasks(**options, gamma=gamma)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def detached(x, y):
        return F.cross_entropy(model(x, "b").detach(), y, reduction="none")

    with pytest.raises(ESAMValueError, match="`losses` must depend on the model's parameters"):
        optimizer.backward(detached, x, y)
    assert optimizer.count == 0


class WithPenalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def losses(self, x, y, *, ask=False):
        with torch.enable_grad():
            hidden = torch.tanh(self.body(x))
            if ask:
                hidden.requires_grad_()
            values = F.cross_entropy(self.head(hidden), y, reduction="none")
            (slope,) = torch.autograd.grad(values.sum(), hidden, create_graph=True)
            return values + slope.square().sum(1)


def test_a_penalty_on_a_pruned_activation_names_the_way_out():
    torch.manual_seed(0)
    model = WithPenalty()
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    optimizer = ESAM(sgd(model), model, perturb=Suffix("head"), gamma=1.0)
    # Before torch 2.13, a first step is not pruned.
    optimizer.loss(lambda x, y: model.losses(x, y, ask=True), x, y).backward()
    optimizer.zero_grad()
    before = Snapshot(model)
    with pytest.raises(RuntimeError) as raised:
        optimizer.loss(model.losses, x, y)
    assert any("`.requires_grad_()`" in note for note in raised.value.__notes__)
    before.check()
    optimizer.loss(lambda x, y: model.losses(x, y, ask=True), x, y).backward()
    found = gradients(model)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    full = ESAM(sgd(twin), twin, perturb=Suffix("head"), gamma=1.0, norm="masked")
    full.backward(lambda x, y: twin.losses(x, y, ask=True), x, y)
    close(found, gradients(twin))
