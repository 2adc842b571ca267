"""Samplers that reach no unit of a model, and suffixes that reach less than was asked for."""

import pytest

from esam_core import Bernoulli, Every, Everything, Only, RandomSuffix, Suffix, Unit
from esam_core.reach import reach_warning, reachable, uses_costs, why_idle, why_short

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


@pytest.mark.parametrize(
    ("sampler", "short"),
    [
        (Suffix(0.5), True),
        (Suffix(0.45), True),
        (Suffix(0.4), False),  # half of it
        (Suffix(0.2), False),
        (Suffix(0.1), False),  # more than was asked for: the last block is not divided either
        (Suffix(1.0), False),
        (Suffix("head"), False),
        (RandomSuffix((0.2, 0.5)), True),
        (RandomSuffix(("head", 1.0)), False),
        (Every(10, Only("weight", Suffix(0.5))), True),
        (Everything(), False),
    ],
)
def test_suffixes_with_less_than_half_of_the_share(sampler, short):
    """The head has 20 % of the cost, and the stem the rest."""
    assert (why_short(sampler, UNITS, ALL) is not None) == short
    assert reach_warning(sampler, UNITS, ALL) == why_short(sampler, UNITS, ALL)


def test_a_single_block_is_not_short():
    assert why_short(Suffix(0.5), UNITS[:2], ALL[:2]) is None


def test_the_warning_names_a_longer_suffix():
    text = why_short(Suffix(0.5), UNITS, ALL)
    assert "perturbs only 20 %" in text and "from 'head' on" in text
    assert text.endswith("Suffix('stem') perturbs 100 %.")


@pytest.mark.parametrize(
    ("sampler", "uses"),
    [
        (Bernoulli(0.5), False),
        (Everything(), False),
        (Suffix("head"), False),
        (Suffix(0.5), True),
        (RandomSuffix((0.3, "head")), True),
        (Only("norm"), False),
        (Only(lambda unit: unit.cost > 3.0), True),
        (Every(2, Only("norm", Suffix(0.5))), True),
    ],
)
def test_samplers_that_use_costs(sampler, uses):
    assert uses_costs(sampler) == uses


def test_a_suffix_with_all_that_is_trained_is_not_short():
    """As in fine-tuning: a longer suffix would perturb nothing more."""
    assert why_short(Suffix(0.5), UNITS, (False, False, True)) is None
    assert reach_warning(Suffix(0.5), UNITS, (False, False, True)) is None


def test_a_longer_suffix_is_one_that_perturbs_more():
    units = (
        Unit("a", (1,), block="stem", cost=1.0),
        Unit("b", (1,), block="body", cost=8.0, depth=1, trained=False),
        Unit("c", (1,), block="head", cost=1.0, depth=2),
    )
    text = why_short(Suffix(0.5), units, (True, False, True))
    assert "only 10 % of the network" in text and "before it, 'body', is not divided" in text
    assert text.endswith("Suffix('stem') perturbs 20 %.")
