"""Random generators of the user's own, in attributes: all passes of a step draw the same."""

import copy
import random

import numpy as np
import pytest
import torch
from tests.torch.scene import batch, net
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Part, Previous
from esam_torch.generators import set_state, state_of

KINDS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand((), generator=g)),
    "numpy": (lambda: np.random.default_rng(1), lambda g: float(g.random())),
    "numpy, older": (lambda: np.random.RandomState(1), lambda g: float(g.rand())),
    "python": (lambda: random.Random(1), lambda g: g.random()),
}

DIRECTIONS = {
    "the whole batch": {"gamma": 0.5},
    "a part": {"gamma": 0.5, "ascend": Part(0.5)},
    "the previous gradient": {"gamma": 0.5, "ascend": Previous()},
}


class Scaling(nn.Module):
    """Scales its input by a random number from a generator of its own, or from a list of them."""

    def __init__(self, kind, *, listed):
        super().__init__()
        build, self.draw = KINDS[kind]
        self.inner = net(dropout=0.0)
        self.generators = [build()] if listed else build()
        self.drawn = []

    def forward(self, x):
        inside = self.generators
        number = self.draw(inside[0] if isinstance(inside, list) else inside)
        DRAWN.append(float(number))
        return self.inner(x * (0.5 + number))


DRAWN = []


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_generators_of_modules(kind, direction, listed):
    """Each step draws one new number, the same in each pass, as a plain loop would."""
    model = Scaling(kind, listed=listed)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, rho=0.1, perturb=Everything(), **DIRECTIONS[direction])
    build, draw = KINDS[kind]
    alone, steps = build(), []
    for _ in range(6):
        DRAWN.clear()
        optimizer.step(losses_of(model), *batch())
        steps.append(DRAWN.copy())
    for found in steps:
        assert len(found) > 0
        assert found == [pytest.approx(float(draw(alone)), abs=0)] * len(found)


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


class Scene:
    """An object in the batch, with a generator of its own, and perhaps with tensors."""

    def __init__(self, generator, **tensors):
        self.generator = generator
        vars(self).update(tensors)


@pytest.mark.parametrize("tensors", [True, False], ids=["with tensors", "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_generators_of_objects_in_the_batch(kind, tensors):
    model = net(dropout=0.0)
    build, draw = KINDS[kind]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    # The object's tensors are passed whole, so no pass may have only some of the samples.
    gamma = 1.0 if tensors else 0.5
    optimizer = ESAM(base, model, rho=0.1, perturb=Everything(), gamma=gamma)
    x, y = batch()
    scene, alone, drawn = Scene(build(), **({"x": x} if tensors else {})), build(), []

    def losses(x, y, scene):
        drawn.append(float(draw(scene.generator)))
        inputs = getattr(scene, "x", x)
        return F.cross_entropy(model(inputs * (0.5 + drawn[-1])), y, reduction="none")

    for _ in range(3):
        drawn.clear()
        optimizer.step(losses, x, y, scene)
        assert len(drawn) >= 2
        assert drawn == [float(draw(alone))] * len(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_restores_generators(kind):
    model = Scaling(kind, listed=False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, rho=0.1, perturb=Everything(), gamma=1.0)
    optimizer.step(losses_of(model), *batch())
    before = state_of(model.generators)

    def broken(x, y):
        values = losses_of(model)(x, y)
        if len(DRAWN) == 2:
            raise RuntimeError("in the second pass")
        return values

    DRAWN.clear()
    with pytest.raises(RuntimeError, match="in the second pass"):
        optimizer.step(broken, *batch())
    assert state_of(model.generators) == before


@pytest.mark.parametrize("kind", KINDS)
def test_states(kind):
    build, draw = KINDS[kind]
    generator = build()
    start = state_of(generator)
    first = [float(draw(generator)) for _ in range(3)]
    assert state_of(generator) != start
    set_state(generator, start)
    assert state_of(generator) == start
    assert [float(draw(generator)) for _ in range(3)] == first
    if kind != "torch":
        assert state_of(copy.deepcopy(generator)) == state_of(generator)
