"""Batches of every shape, and other outputs of `losses`."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from tests.torch.scene import batch, losses_of, net, same, sgd
from torch.nn import functional as F

from esam_torch import ESAM, Whole
from esam_torch.fitting.data import move_batch


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Record:
    pair: Pair
    name: str


class Encoding(dict):
    """A library's mapping with an attribute in addition to its items."""

    def __init__(self, *args, source="", **kwargs):
        super().__init__(*args, **kwargs)
        self.source = source


def nested(form, x, y):
    """Return (arguments, keywords, a function that extracts inputs and targets)."""
    return {
        "tuple": (((x, y),), {}, lambda d: d),
        "list": (([x, [y]],), {}, lambda d: (d[0], d[1][0])),
        "named tuple": ((Pair(x, y),), {}, lambda d: (d.inputs, d.targets)),
        "dict": (({"x": x, "deep": {"y": y}},), {}, lambda d: (d["x"], d["deep"]["y"])),
        "ordered": ((OrderedDict(x=x, y=y),), {}, lambda d: (d["x"], d["y"])),
        "mapping": (
            (Encoding({"x": x, "y": y}, source="here"),),
            {},
            lambda d: (d["x"], d["y"]) if d.source == "here" else None,
        ),
        "dataclass": (
            (Record(Pair(x, y), "one"),),
            {},
            lambda d: (d.pair.inputs, d.pair.targets) if d.name == "one" else None,
        ),
        "keywords": ((x,), {"y": y}, lambda x, y: (x, y)),
        "beside plain values": ((x, 3, None, "text", y), {}, lambda x, *_: (x, _[-1])),
    }[form]


FORMS = (
    *("tuple", "list", "named tuple", "dict", "ordered", "mapping", "dataclass", "keywords"),
    "beside plain values",
)


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_shape(form):
    args, kwargs, find = nested(form, *batch())
    model, plain = net(), net()
    optimizer, other = (ESAM(sgd(m), m, rho=0.1, gamma=0.5) for m in (model, plain))
    torch.manual_seed(3)
    wanted = other.step(losses_of(plain), *batch())
    torch.manual_seed(3)
    report = optimizer.step(lambda *a, **k: losses_of(model)(*find(*a, **k)), *args, **kwargs)
    assert report.indices.tolist() == wanted.indices.tolist()
    same(model.state_dict(), plain.state_dict(), form)


def test_whole_values_are_not_sliced():
    """Ten classes and ten samples: the class weights look like one value per sample."""
    model = net(dropout=0.0)
    optimizer = ESAM(sgd(model), model, rho=0.1, gamma=0.5)
    x, y = batch(3)
    seen = []

    def losses(x, y, weights):
        seen.append((len(x), len(weights)))
        return F.cross_entropy(model(x), y, weight=weights, reduction="none")

    report = optimizer.step(losses, x, y, Whole(torch.tensor([1.0, 2.0, 0.5])))
    assert seen == [(3, 3), *[(3, 3), (2, 3)] * 2]  # the second and third compare the losses
    assert report.indices.shape == (2,)


def test_other_outputs_of_losses_are_in_the_report():
    model = net()
    optimizer = ESAM(sgd(model), model, rho=0.1)

    def losses(x, y):
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="none"), {"logits": logits}

    report = optimizer.step(losses, *batch())
    assert report.outputs["logits"].shape == (8, 3)
    assert not report.outputs["logits"].requires_grad  # a kept report must not keep the graph


# -- objects that raise other errors than AttributeError ------------------------------------------


class AttrDict(dict):
    """A dictionary that can be read as an object; any other name raises a KeyError."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Eager:
    """An object whose lookups fail in a way of their own."""

    def __getattr__(self, name):
        raise ValueError(name)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_objects_whose_lookups_raise_errors_of_their_own(gamma):
    """A dictionary of the user's, and a list of them with one per sample; each pass has a copy."""
    (x, y), model, twin = batch(), net(dropout=0.0), net(dropout=0.0)

    def losses(b, notes, _):
        assert type(b) is AttrDict and len(notes) == len(b.x)
        b.x = b.x * 2.0
        return F.cross_entropy(model(b.x), b.y, reduction="none")

    optimizer, other = (ESAM(sgd(m), m, rho=0.1, gamma=gamma) for m in (model, twin))
    given = AttrDict(x=x, y=y)
    for _ in range(2):
        optimizer.step(losses, given, [AttrDict(name="one")] * 8, Eager())
        other.step(losses_of(twin), x * 2.0, y)
    assert given.x is x
    same(model.state_dict(), twin.state_dict(), "weights")


def test_fit_moves_batches_whose_lookups_raise_errors_of_their_own():
    x = torch.ones(2)
    moved = move_batch([AttrDict(x=x), Eager()], torch.device("cpu"))
    assert moved[0].x is x
