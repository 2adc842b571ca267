"""Several functions with one optimizer: where each has its samples is remembered separately."""

import copy
import functools
import warnings

import pytest
import torch
from tests.torch.batches import table
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Part
from esam_torch.batch import Samples
from esam_torch.functions import code_of

X, Y, SCALE = table(12, 6) / 12, torch.arange(12) % 3, torch.full((5,), 0.3)


def make(**options):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, ESAM(optimizer, model, **{"rho": 0.1, "perturb": Everything(), **options})


def classes(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def scaled(model):
    return lambda x, scale, y: scale.sum() * F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("order", ["two first", "three first"])
@pytest.mark.parametrize(
    "options", [{"gamma": 0.5}, {"gamma": 1.0, "ascend": Part(0.25)}], ids=["selected", "part"]
)
def test_functions_whose_arguments_have_other_places(options, order):
    """The second argument is one label per sample, or numbers for all samples."""
    model, optimizer = make(**options)
    twin, other = make(**options)
    tasks = [(classes, (X, Y)), (scaled, (X, SCALE, Y))]
    for build, arguments in 2 * (tasks if order == "two first" else tasks[::-1]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # each counts its samples once, by a forward
            optimizer.step(build(model), *arguments)
        if build is classes:
            other.step(classes(twin), X, Y)
        else:
            factor = SCALE.sum()
            other.step(
                lambda x, y: factor * F.cross_entropy(twin(x), y, reduction="none"),  # noqa: B023
                X,
                Y,
            )
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


def test_the_same_code_is_the_same_function():
    model, _ = make()
    samples, batch = Samples(), ((X, Y), {})
    one, another = classes(model), classes(model)
    assert samples.of(one, batch) is samples.of(another, batch)
    assert samples.of(functools.partial(one), batch) is samples.of(one, batch)
    assert samples.of(torch.no_grad()(one), batch) is samples.of(one, batch)
    assert samples.of(scaled(model), batch) is not samples.of(one, batch)
    assert samples.of(one, ((X, SCALE, Y), {})) is not samples.of(one, batch)
    assert samples.of(one, ((X,), {"y": Y})) is not samples.of(one, ((X,), {"z": Y}))


def test_methods_and_objects():
    class Task:
        def losses(self, x):
            return x

        def __call__(self, x):
            return x

    assert code_of(Task().losses) is code_of(Task().losses) is Task.losses.__code__
    assert code_of(Task()) is Task.__call__.__code__
    assert code_of(torch.nn.Identity()) is torch.nn.Identity.forward.__code__
    assert code_of(len) is type(len)

    def wrapping_itself(x):
        return x

    wrapping_itself.__wrapped__ = wrapping_itself
    assert code_of(wrapping_itself) is wrapping_itself.__code__


def test_an_optimizer_that_has_read_batches_can_be_copied():
    model, optimizer = make(gamma=0.5)
    optimizer.step(classes(model), X, Y)
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.step(classes(model), X, Y)
