"""Variables that `losses` reads from outside, and that change before the backward."""

import functools
import types

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, sgd
from torch.nn import functional as F

from esam_core import ESAMRuntimeError
from esam_torch import ESAM, Everything, Momentum, Part, Previous, Suffix

SETTINGS = {
    "default": {},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "Suffix with Part": {"perturb": Suffix(0.5), "gamma": 1.0, "ascend": Part(0.25)},
}

factor = 1.0
loss = None
calls = 0


def make(model, **settings):
    return ESAM(sgd(model), model, **{"rho": 0.1, **settings})


def plain_losses(model, x, y, by=1.0):
    return by * F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_loop_variable_is_refused_by_name(settings):
    model = net(dropout=0.0)
    optimizer = make(model, **settings)
    total = 0.0
    for by in (1.0, 2.0):
        total = total + optimizer.loss(
            lambda x, y: plain_losses(model, x, y, by),  # noqa: B023
            *batch(),
        )
    before = Snapshot(model)
    with pytest.raises(ESAMRuntimeError, match=r"another value of `by`.*`lambda x, y, by=by: "):
        total.backward()
    before.check(but=("random", "buffers"))
    assert optimizer.count == 1  # the last one is right


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_way_out(settings):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer, other = make(model, **settings), make(twin, **settings)
    total = 0.0
    for by in (1.0, 2.0):
        total = total + optimizer.loss(lambda x, y, by=by: plain_losses(model, x, y, by), *batch())
    total.backward()
    one = other.loss(lambda x, y: plain_losses(twin, x, y), *batch())
    two = other.loss(lambda x, y: plain_losses(twin, x, y, 2.0), *batch())
    (one + two).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Task:
    def __init__(self, model):
        self.model = model

    def losses(self, x, y):
        return plain_losses(self.model, x, y, factor)


FORMS = {
    "function": lambda model: lambda x, y: plain_losses(model, x, y, factor),
    "comprehension": lambda model: (
        lambda x, y: sum([plain_losses(model, x, y, factor) for _ in "ab"])
    ),
    "partial": lambda model: functools.partial(
        lambda model, x, y: plain_losses(model, x, y, factor), model
    ),
    "method": lambda model: Task(model).losses,
    "decorated": lambda model: torch.enable_grad()(lambda x, y: plain_losses(model, x, y, factor)),
}


@pytest.mark.parametrize("form", FORMS)
def test_global_variables(form, monkeypatch):
    model = net(dropout=0.0)
    optimizer = make(model)
    mean = optimizer.loss(FORMS[form](model), *batch())
    monkeypatch.setitem(globals(), "factor", float("1.0"))  # another object, but the same number
    mean.backward()
    mean = optimizer.loss(FORMS[form](model), *batch())
    monkeypatch.setitem(globals(), "factor", 2.0)
    with pytest.raises(ESAMRuntimeError, match=r"another value of `factor`"):
        mean.backward()


def test_a_variable_that_is_deleted():
    model = net(dropout=0.0)
    by = 2.0
    mean = make(model).loss(lambda x, y: plain_losses(model, x, y, by), *batch())  # noqa: F821
    del by
    with pytest.raises(ESAMRuntimeError, match=r"another value of `by`"):
        mean.backward()


# -- no false alarms -------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_variables_that_it_assigns_itself(settings):
    model, count = net(dropout=0.0), 0
    optimizer = make(model, **settings)

    def losses(x, y):
        nonlocal count
        global calls
        count, calls = count + 1, calls + 1
        return plain_losses(model, x, y)

    mean = optimizer.loss(losses, *batch())
    count = 10
    mean.backward()
    optimizer.step()
    optimizer.step(losses, *batch())
    assert count > 11 and calls > 2 and optimizer.count == 2


def test_an_attribute_with_the_name_of_a_global_variable(monkeypatch):
    """`loss = optimizer.loss(...)` in a script whose function reads `outputs.loss`."""
    model = net(dropout=0.0)

    def losses(x, y):
        return types.SimpleNamespace(loss=plain_losses(model, x, y)).loss

    mean = make(model).loss(losses, *batch())
    monkeypatch.setitem(globals(), "loss", mean)
    mean.backward()


@pytest.mark.parametrize(
    "settings",
    [{"rho": 0.0}, {"rho": 0.0, "on_nonfinite": "skip"}]
    + [{"ascend": ascend, "gamma": 1.0} for ascend in (Previous(), Momentum())],
    ids=["base step", "checked base step", "Previous", "Momentum"],
)
def test_steps_that_call_losses_only_before_the_backward(settings):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    optimizer, other = make(model, **settings), make(twin, **settings)
    for by in (1.0, 2.0, 3.0):
        mean = optimizer.loss(lambda x, y: plain_losses(model, x, y, by), *batch())  # noqa: B023
        by = 10.0
        mean.backward()
        optimizer.step()
    for by in (1.0, 2.0, 3.0):
        other.loss(lambda x, y, by=by: plain_losses(twin, x, y, by), *batch()).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_objects_that_are_not_functions():
    class Losses:
        def __init__(self, model):
            self.model = model

        def __call__(self, x, y):
            return plain_losses(self.model, x, y)

    model, twin = net(dropout=0.0), net(dropout=0.0)
    make(model).step(Losses(model), *batch())
    make(twin).step(losses_of(twin), *batch())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
