"""Warnings point at the line of the script that called ESAM."""

import inspect
import warnings

import pytest
import torch
from tests.torch.scene import batch, losses_of, net, sgd
from torch.nn import functional as F

from esam_torch import ESAM, Suffix, notices


def line():
    """Return the line number of the call of this function."""
    return inspect.currentframe().f_back.f_lineno


@pytest.fixture
def caught():
    """Return the list of warnings issued so far."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def check(caught, text, where):
    """Require one warning with this text, at this line of this file."""
    (found,) = [w for w in caught if text in str(w.message)]
    assert (found.filename, found.lineno) == (__file__, where)


def half():
    """Return a model in half precision, whose perturbations are rounded away, and an ESAM."""
    model = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
    optimizer = ESAM(sgd(model), model, rho=1e-6, gamma=1.0)
    inputs, targets = torch.randn(8, 4, dtype=torch.bfloat16), torch.arange(8) % 3
    return optimizer, losses_of(model), inputs, targets


def test_at_the_call_of_loss(caught):
    optimizer, losses, *data = half()
    optimizer.loss(losses, *data).backward()
    where = line() + 1
    optimizer.loss(losses, *data)
    check(caught, "rounded away", where)


def test_a_suffix_with_less_than_half_of_the_share(caught):
    """Once, and not if a suffix names its block."""
    model = net()
    for perturb in (Suffix("head"), Suffix(0.5)):
        optimizer = ESAM(sgd(model), model, rho=0.1, perturb=perturb)
        for _ in range(3):
            optimizer.step(losses_of(model), *batch())
    (found,) = [str(w.message) for w in caught if "perturbs only" in str(w.message)]
    assert "perturb=Suffix(start=0.5) perturbs only" in found
    assert "because the block before it, 'conv', is not divided. Suffix('conv') perturbs" in found


def test_at_the_call_of_backward(caught):
    optimizer, losses, *data = half()
    where = line() + 1
    optimizer.backward(losses, *data)
    check(caught, "rounded away", where)


@pytest.mark.parametrize("schedulers", [0, 1, 2])
def test_at_the_call_of_step(schedulers, caught):
    model = net()
    optimizer = ESAM(sgd(model), model)
    for _ in range(schedulers):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    where = line() + 1
    optimizer.step()
    check(caught, "without a backward of optimizer.loss", where)


@pytest.mark.parametrize("schedulers", [0, 1])
def test_at_the_call_of_step_with_a_batch(schedulers, caught):
    optimizer, losses, *data = half()
    for _ in range(schedulers):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    where = line() + 1
    optimizer.step(losses, *data)
    check(caught, "rounded away", where)


@pytest.mark.parametrize("call", ["loss", "backward", "step", "measured_units", "plan"])
def test_of_weights_that_are_used_before_their_block(call, caught):
    model = net()
    options = {"budget": 1.5} if call == "plan" else {"perturb": Suffix(0.5)}
    optimizer = ESAM(sgd(model), model, **options)

    def losses(inputs, targets):
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model(inputs), targets, reduction="none") + 1e-4 * penalty

    where = line() + 1
    getattr(optimizer, call)(losses, *batch())
    check(caught, "before these blocks run", where)
    optimizer.loss(losses, *batch())
    assert len([w for w in caught if "before these blocks" in str(w.message)]) == 1


def test_of_a_closure_at_its_own_line(caught):
    optimizer, losses, *data = half()
    lines = []

    def closure():
        optimizer.zero_grad()
        lines.append(line() + 1)
        optimizer.backward(losses, *data)

    optimizer.step(closure)
    check(caught, "rounded away", lines[0])


class Tagger(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.recurrent = torch.nn.GRU(4, 8, batch_first=True, **options)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Pretend that all modules are on a GPU."""
    monkeypatch.setattr(notices, "device_type", lambda module: "cuda")


@pytest.mark.usefixtures("on_a_gpu")
def test_dropout_of_recurrent_layers_on_a_gpu(caught):
    """cuDNN has its own random state."""
    model = Tagger(num_layers=2, dropout=0.5)
    optimizer = ESAM(sgd(model), model)
    data = torch.randn(6, 5, 4), torch.arange(6) % 3
    where = line() + 1
    optimizer.loss(losses_of(model), *data).backward()
    optimizer.step()
    check(caught, "dropout inside recurrent differs between the passes", where)
    optimizer.step(losses_of(model), *data)
    assert len([w for w in caught if "recurrent" in str(w.message)]) == 1


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("options", [{"num_layers": 2}, {}])
def test_recurrent_layers_without_dropout(options):
    assert notices.recurrent_dropout_warning(Tagger(**options)) is None


@pytest.mark.usefixtures("on_a_gpu")
def test_recurrent_layers_whose_dropout_is_off_or_not_cudnns(monkeypatch):
    model = Tagger(num_layers=2, dropout=0.5)
    assert notices.recurrent_dropout_warning(model) is not None
    assert notices.recurrent_dropout_warning(model.eval()) is None
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert notices.recurrent_dropout_warning(model.train()) is None


def test_recurrent_layers_on_a_cpu():
    assert notices.recurrent_dropout_warning(Tagger(num_layers=2, dropout=0.5)) is None
