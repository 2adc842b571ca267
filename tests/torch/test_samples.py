"""Selecting samples from batches, in a step and by the user's own function; and outputs."""

import operator
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests.torch.batches import Holder, SharedStore, packed, table
from torch import nn
from torch.nn import functional as F

from esam_core import ESAMTypeError
from esam_torch import ESAM, Everything, Rows, Whole
from esam_torch.batch import Samples
from esam_torch.containers import INSIDE, detach_tree, map_values

CHOSEN = torch.tensor([1, 3])


class Pair(NamedTuple):
    inputs: object
    more: object


# -- `take` --------------------------------------------------------------------------------------


def test_a_custom_function():
    asked = []

    def take(batch, indices):
        asked.append(indices)
        x, y = batch
        return x[:, indices], Holder(y.x[indices])

    samples = Samples(take)
    batch = ((Whole(table(5, 2).T), Holder(table(5))), {})
    samples.check(batch, 5)
    assert not asked
    (x, y), named = samples.take(batch, CHOSEN, 5)
    assert torch.equal(x, table(5, 2).T[:, CHOSEN]) and torch.equal(y.x, table(5)[CHOSEN])
    assert not named and asked[0] is CHOSEN


def test_a_custom_function_with_keywords():
    def take(batch, indices, *, y):
        return batch, {"y": y[indices]}

    (x,), named = Samples(take).take(((3,), {"y": table(5)}), CHOSEN, 5)
    assert x == 3 and torch.equal(named["y"], table(5)[CHOSEN])


@pytest.mark.parametrize(
    ("returned", "kwargs"),
    [(table(2), {}), ([table(2)], {}), ((table(2), 3), {}), ((table(2),), {"y": 1}), (None, {})],
)
def test_what_a_custom_function_must_return(returned, kwargs):
    samples = Samples(lambda batch, indices, **_: returned)
    with pytest.raises(ESAMTypeError, match=r"`take` must return a tuple of 1 arguments"):
        samples.take(((table(5),), kwargs), CHOSEN, 5)


def test_take_must_be_a_function():
    with pytest.raises(ESAMTypeError, match=r"`take` must be a function.*Received: int"):
        Samples(3)
    net = nn.Linear(2, 2)
    with pytest.raises(ESAMTypeError, match=r"`take` must be a function"):
        ESAM(torch.optim.SGD(net.parameters(), lr=0.1), net, take="x")


# -- the bare batch ------------------------------------------------------------------------------


def test_marks_are_removed():
    x, plain = table(5), {"deep": [Holder("a")]}
    args, kwargs = Samples().bare(((Whole(x), [Rows(x), 1], plain), {"y": Pair(Whole(2), x)}))
    assert args[0] is x and args[1] == [x, 1] and kwargs["y"] == Pair(2, x)
    assert args[2] == plain and args[2] is not plain  # each pass has its own containers


def test_a_batch_without_marks_is_not_changed():
    odd, store, found = (packed(), Holder(1)), SharedStore({"x": 1}), torch.max(table(5, 2), 1)
    args, _ = Samples().bare(((*odd, store, found), {}))
    assert all(map(operator.is_, args[:2], odd)) and dict(args[2]) == {"x": 1}
    assert type(args[3]) is type(found) and all(map(operator.is_, args[3], found))


@pytest.mark.parametrize(
    "value",
    [
        *(iter("ab"), torch.Generator(), np.random.default_rng()),
        *(np.random.RandomState(0), random.Random(0)),
    ],
)
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_value_that_a_pass_uses_up_is_refused(value, gamma):
    net = nn.Linear(1, 1)
    esam = ESAM(torch.optim.SGD(net.parameters(), lr=0.1), net, beta=1.0, gamma=gamma)
    once = "can be read only once.*Use a list" if hasattr(value, "__next__") else "other numbers"
    with pytest.raises(ESAMTypeError, match=rf"`batch\[1\]` .*{once}"):
        esam.loss(lambda x, _: net(x[:, None])[:, 0], table(5), value)


def test_values_that_contain_themselves():
    """A tree whose nodes refer to their parents: whole for gamma=1, otherwise an error."""
    node = {"x": table(5)}
    node["children"] = [{"parent": node}]
    args, _ = Samples().bare(((node, Whole(table(5))), {}))
    assert args[0] is node and torch.equal(args[1], table(5))
    assert detach_tree(node)["children"][0]["parent"] is not None
    with pytest.raises(
        ESAMTypeError, match=r"must not contain itself.*take=.*Received: a (dict|list)"
    ):
        Samples().check(((node,), {}), 5)
    samples = Samples()
    samples.check(((Whole(node), table(5)), {}), 5)
    assert samples.take(((Whole(node), table(5)), {}), CHOSEN, 5)[0][0] is node
    node["x"] = table(3)
    assert samples.take(((table(5), [node] * 5), {}), CHOSEN, 5)[0][1][1] is node  # an item


def test_the_note_lists_how_values_were_read():
    samples, batch = Samples(), ((table(5), "text"), {"y": list("abcde")})
    samples.check(batch, 5)
    note = samples.note(batch, 2, 5)
    assert "on 2 of 5 samples" in note
    assert r"Split by sample: batch[0] (Tensor of shape (5,)), y (list of str, length 5)." in note
    assert "Passed whole: batch[1] (str)." in note


# -- outputs -------------------------------------------------------------------------------------


def test_outputs_of_known_types_are_detached():
    grown = torch.ones(2, requires_grad=True) * 2
    strange = Holder(grown)
    store = SharedStore({"x": grown})
    found = detach_tree({"a": [grown, None], "b": Pair(grown, 1), "c": strange, "d": store})
    assert not found["a"][0].requires_grad and not found["b"].inputs.requires_grad
    assert found["c"] is strange and found["d"] is store and store["x"] is grown
    both = detach_tree(torch.max(torch.ones(2, 2, requires_grad=True), 1))
    assert not both.values.requires_grad and type(both).__name__ == "max"


def test_subclasses_of_list_are_kept():
    class Named(list):
        name = "none"

    x = Named([torch.ones(2, 2), 3])
    x.name = "mine"
    twin = map_values(x, lambda v, _: v[:1] if isinstance(v, torch.Tensor) else INSIDE)
    assert type(twin) is Named and twin.name == "mine" and twin[0].shape == (1, 2)
    assert x[0].shape == (2, 2)


# -- whole steps ---------------------------------------------------------------------------------


def make(**options):
    torch.manual_seed(0)
    net = nn.Linear(3, 5)
    options = {"rho": 0.1, "perturb": Everything(), "gamma": 0.5, **options}
    return net, ESAM(torch.optim.SGD(net.parameters(), lr=0.1), net, **options)


FORMS = {
    "arrays": lambda x, y: (x, y.numpy()),
    "lists": lambda x, y: (list(x), y.tolist()),
    "tuples": lambda x, y: (tuple(x), tuple(y.tolist())),
    "words": lambda x, y: (x, [str(int(label)) for label in y]),
    "uncollated": lambda x, y: (list(zip(x, y.tolist(), strict=True)),),
    "a dictionary of lists": lambda x, y: ({"x": list(x), "y": y.tolist()},),
}


def read(*batch):
    """Return inputs and targets as tensors, from any form."""
    if len(batch) == 1 and isinstance(batch[0], dict):
        batch = batch[0]["x"], batch[0]["y"]
    elif len(batch) == 1:
        batch = tuple(zip(*batch[0], strict=True))
    x, y = batch
    x = x if isinstance(x, torch.Tensor) else torch.stack(list(x))
    return x, y if isinstance(y, torch.Tensor) else torch.tensor([int(label) for label in y])


@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_samples_of_every_form_equals_that_with_tensors(form):
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
    net, optimizer = make()
    twin, other = make()

    def losses_of(model):
        def losses(*batch):
            inputs, targets = read(*batch)
            return F.cross_entropy(model(inputs), targets, reduction="none")

        return losses

    for _ in range(3):
        wanted = other.step(losses_of(twin), x, y)
        report = optimizer.step(losses_of(net), *FORMS[form](x, y))
        assert report.indices.tolist() == wanted.indices.tolist()
        assert torch.equal(net.weight, twin.weight)
    start, _ = make()
    assert not torch.equal(net.weight, start.weight)


def test_a_step_with_a_custom_function():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))  # samples in columns
    y = torch.arange(8) % 5
    net, optimizer = make(take=lambda batch, i: (batch[0][:, i], batch[1][i]))
    twin, other = make()
    optimizer.step(lambda x, y: F.cross_entropy(net(x.T), y, reduction="none"), x, y)
    other.step(lambda x, y: F.cross_entropy(twin(x), y, reduction="none"), x.T, y)
    assert torch.equal(net.weight, twin.weight)


def test_with_all_samples_the_batch_can_be_anything():
    net, optimizer = make(gamma=1.0, take=lambda *_: 1 / 0)
    images = [torch.randn(3, 4 + i, 4) for i in range(3)]

    def losses(images, marked, *_):
        assert isinstance(marked, list)
        return torch.stack([net(image.mean((1, 2))).square().mean() for image in images])

    report = optimizer.step(losses, images, Rows([1]), packed(), SharedStore({"x": table(3)}))
    assert report.indices is None and report.losses.shape == (3,)
    optimizer.backward(lambda: losses(images, []))
