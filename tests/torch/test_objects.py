"""Batches that are objects of the user's own classes, and NumPy arrays, which passes may change."""

import copy
import types

import numpy as np
import pytest
import torch
from tests.torch.scene import batch, losses_of, net
from torch.nn import functional as F

from esam_core import ESAMRuntimeError
from esam_torch import ESAM, Everything, Momentum, Part, Previous, Rows, Suffix

SETTINGS = {
    "SAM": {},
    "blocks are found first": {"perturb": Suffix("head")},
    "Previous": {"ascend": Previous()},
    "Momentum": {"ascend": Momentum()},
}


class Sample:
    def __init__(self, x, y):
        self.x = x
        self.y = y
        self.calls = 0


def make(model, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"rho": 0.1, "perturb": Everything(), "gamma": 1.0, **settings}
    return ESAM(optimizer, model, **settings)


def same_weights(model, twin):
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


KINDS = {
    "a class": Sample,
    "a namespace": lambda x, y: types.SimpleNamespace(x=x, y=y, calls=0),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_reads_the_attributes_of_the_first(kind, settings):
    """After the step they are as after one call."""
    model, twin, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()
    optimizer, other = make(model, **settings), make(twin, **settings)

    def losses(holder):
        given = holder["one"]
        assert not hasattr(given, "logits")
        given.x, given.calls = given.x * 2.0, given.calls + 1
        given.logits = model(given.x)
        return F.cross_entropy(given.logits, given.y, reduction="none")

    for _ in range(5):
        given = KINDS[kind](x, y)
        optimizer.step(losses, {"one": given})
        other.step(losses_of(twin), x * 2.0, y)
        same_weights(model, twin)
        assert torch.equal(given.x, x * 2.0) and given.calls == 1 and hasattr(given, "logits")


def test_a_mark_of_what_is_done_is_read_as_in_the_first_pass():
    model, twin, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()
    given = Sample(x, y)
    given.done = []

    def losses(given):
        if not given.done:
            given.x = given.x * 2.0
            given.done.append(True)
        return F.cross_entropy(model(given.x), given.y, reduction="none")

    optimizer, other = make(model), make(twin)
    for _ in range(3):  # the same object, as in training on the full batch
        optimizer.step(losses, given)
        other.step(losses_of(twin), x * 2.0, y)
    same_weights(model, twin)
    assert torch.equal(given.x, x * 2.0) and given.done == [True]


def in_place(x):
    x *= 2.0


FORMS = {
    "a tensor of an object": (Sample, lambda b: in_place(b.x)),
    "an array of an object": (lambda x, y: Sample(x.numpy(), y), lambda b: in_place(b.x)),
    "a tensor that is replaced too": (
        Sample,
        lambda b: (in_place(b.x), setattr(b, "x", b.x.clone())),
    ),
    "an array": (lambda x, y: {"x": x.numpy(), "y": y}, lambda b: in_place(b["x"])),
}


def reading(model, change):
    def losses(given):
        change(given)
        x, y = (given["x"], given["y"]) if isinstance(given, dict) else (given.x, given.y)
        return F.cross_entropy(model(torch.as_tensor(x)), y, reduction="none")

    return losses


@pytest.mark.parametrize("settings", [{}, {"perturb": Suffix("head")}], ids=["SAM", "Suffix"])
@pytest.mark.parametrize("form", FORMS)
def test_values_that_each_pass_changes_in_place_are_refused(form, settings):
    model, (build, change) = net(dropout=0.0), FORMS[form]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ESAMRuntimeError, match=r"must not change its batch in place"):
        make(model, **settings).step(reading(model, change), build(*batch()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_array_that_only_the_first_pass_reads_whole_is_refused():
    model, (build, change) = net(dropout=0.0), FORMS["an array"]
    with pytest.raises(ESAMRuntimeError, match=r"an array of shape"):
        make(model, gamma=0.5).step(reading(model, change), build(*batch()))


def test_selected_rows_of_an_array_are_copies():
    """The ascent pass writes to a copy of its samples; only the descent writes to the array."""
    model, twin, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()
    build, change = FORMS["an array"]
    make(model, ascend=Part(0.5)).step(reading(model, change), build(x.clone(), y))
    make(twin, ascend=Part(0.5)).step(losses_of(twin), x * 2.0, y)
    same_weights(model, twin)


@pytest.mark.parametrize("form", FORMS)
def test_a_base_step_has_one_pass_and_may_write(form):
    """Once, although a sampler of suffixes runs an extra forward first."""
    model, plain, (build, change) = net(dropout=0.0), net(dropout=0.0), FORMS[form]
    optimizer, (x, y) = make(model, rho=0.0, perturb=Suffix("head")), batch()
    given = build(x.clone(), y)
    wanted = losses_of(plain)(x * 2.0, y)
    assert torch.equal(optimizer.step(reading(model, change), given).losses, wanted)
    left = given["x"] if isinstance(given, dict) else given.x
    assert torch.equal(torch.as_tensor(left), x * 2.0)


def test_writing_the_same_values_into_an_array_again_is_allowed():
    model, twin, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()
    x[1, 1, 2] = float("nan")

    def cleaning(a, y):
        a[np.isnan(a)] = 0.0
        return F.cross_entropy(model(torch.from_numpy(a)), y, reduction="none")

    make(model).step(cleaning, Rows(x.clone().numpy()), y)
    make(twin).step(losses_of(twin), x.nan_to_num(0.0), y)
    same_weights(model, twin)


# -- between a loss and its backward ---------------------------------------------------------------


def test_an_object_whose_tensors_are_replaced_before_the_backward_is_refused():
    model, (x, y) = net(dropout=0.0), batch()
    given = Sample(x, y)
    loss = make(model).loss(reading(model, lambda _: None), given)
    given.x = x + 1.0
    with pytest.raises(ESAMRuntimeError, match=r"The batch must not change.*other tensors"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "settings", [{"ascend": Previous()}, {"rho": 0.0, "on_nonfinite": "skip"}], ids=str
)
def test_they_may_be_replaced_if_no_pass_reads_them_again(settings):
    model, twin, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()
    optimizer, other = make(model, **settings), make(twin, **settings)
    for _ in range(3):
        given = Sample(x, y)
        loss = optimizer.loss(reading(model, lambda _: None), given)
        given.x = x + 1.0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        other.step(losses_of(twin), x, y)
        same_weights(model, twin)


def test_other_attributes_that_are_set_before_the_backward_remain():
    model, (x, y) = net(dropout=0.0), batch()
    given, seen = Sample(x, y), []
    loss = make(model).loss(reading(model, lambda b: seen.append(b.calls)), given)
    given.calls, given.new = 5, 6
    loss.backward()
    assert seen == [0, 0] and given.calls == 5 and given.new == 6


@pytest.mark.parametrize("kind", KINDS)
def test_new_attributes_with_tensors_may_be_set_before_the_backward(kind):
    """An object that keeps its loss, or a property that is computed when it is first read."""
    model, twin, (x, y) = net(dropout=0.0), net(dropout=0.0), batch()
    given = KINDS[kind](x, y)
    given.loss = make(model).loss(reading(model, lambda b: hasattr(b, "loss") and 1 / 0), given)
    given.mask = y > 0
    given.loss.backward()
    make(twin).loss(losses_of(twin), x, y).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert given.loss.shape == () and torch.equal(given.mask, y > 0)


@pytest.mark.parametrize("build", [lambda x: x, lambda x: {"x": [x]}, lambda x: Sample(x, 0)])
def test_an_array_that_is_written_to_before_the_backward_is_refused(build):
    """A buffer for observations that an environment fills again."""
    model, (x, y) = net(dropout=0.0), batch()
    array = x.numpy().copy()

    def losses(given, y):
        given = given["x"][0] if isinstance(given, dict) else getattr(given, "x", given)
        return F.cross_entropy(model(torch.tensor(given)), y, reduction="none")

    loss = make(model).loss(losses, build(array), y)
    array *= 2.0
    with pytest.raises(ESAMRuntimeError, match=r"The batch must not change.*an array"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
