"""Random generators of the host can be set back."""

import random

import numpy as np
import pytest

from esam_core.generators import HostRandomState, is_generator, set_state, state_of

KINDS = {
    "NumPy": (lambda: np.random.default_rng(1), lambda g: float(g.random())),
    "NumPy, older": (lambda: np.random.RandomState(1), lambda g: float(g.normal())),
    "NumPy, global": (lambda: np.random, lambda g: float(g.normal())),
    "Python": (lambda: random.Random(1), lambda g: g.gauss(0.0, 1.0)),
    "Python, global": (lambda: random, lambda g: g.gauss(0.0, 1.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_repeats_from_its_state(kind):
    """`normal` and `gauss` keep every second number for later: it is part of the state."""
    build, draw = KINDS[kind]
    generator = build()
    draw(generator)
    state = state_of(generator)
    first = [draw(generator) for _ in range(3)]
    assert state_of(generator) != state
    set_state(generator, state)
    assert state_of(generator) == state
    assert [draw(generator) for _ in range(3)] == first


@pytest.mark.parametrize("value", [random.SystemRandom(), 3, "random", None, np.ones(2)])
def test_other_values_have_no_state(value):
    assert state_of(value) is None


def test_kinds():
    assert all(is_generator(KINDS[kind][0]()) for kind in ("NumPy", "NumPy, older", "Python"))
    assert not is_generator(random)
    assert not is_generator(3)


@pytest.mark.parametrize("draw", [random.random, np.random.random])
def test_the_global_generators(draw):
    before = HostRandomState()
    assert not before.has_moved()
    first = draw()
    assert before.has_moved()
    before.restore()
    assert not before.has_moved()
    assert draw() == first
