"""Samplers that reach no unit of a model."""

import pytest

from esam_core import Bernoulli, Every, Everything, Only, Suffix, Unit
from esam_core.samplers import reachable, why_idle

UNITS = (
    Unit("stem.weight", (3, 3), block="stem", cost=4.0),
    Unit("stem.bias", (3,), kind="bias", block="stem"),
    Unit("head.weight", (3, 2), block="head", cost=1.0, depth=1),
)
ALL = (True, True, True)


@pytest.mark.parametrize(
    ("sampler", "allowed", "reached"),
    [
        (Everything(), ALL, ALL),
        (Bernoulli(0.5), ALL, ALL),
        (Bernoulli(0.5), (True, False, True), (True, False, True)),
        (Suffix("head"), ALL, (False, False, True)),
        (Suffix("head"), (True, True, False), (False, False, False)),
        (Only("norm"), ALL, (False, False, False)),
        (Every(10, Only("bias")), ALL, (False, True, False)),
    ],
)
def test_the_units_that_a_sampler_may_perturb(sampler, allowed, reached):
    assert reachable(sampler, UNITS, allowed) == reached
    assert (why_idle(sampler, UNITS, allowed) is None) == any(reached)


def test_the_warning_names_the_sampler_and_the_kinds():
    text = why_idle(Only("norm"), UNITS, ALL)
    assert "perturb=Only(kind='norm', inner=Everything()) reaches none" in text
    assert text.endswith("The kinds of these weights: weight, bias.")
    frozen = why_idle(Everything(), UNITS, (False, False, False))
    assert frozen.startswith("No weights are trained and may be perturbed")
