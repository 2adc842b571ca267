"""The cost model, compared with documented numbers and cases computed by hand."""

import pytest

from esam_core import (
    All,
    Bernoulli,
    Between,
    ESAMTypeError,
    ESAMValueError,
    Every,
    Everything,
    Mask,
    Momentum,
    Only,
    Part,
    Previous,
    Proportional,
    Random,
    RandomSuffix,
    Suffix,
    TopIncrease,
    TopLoss,
    Unit,
)
from esam_core.cost import base_cost, expected_cost, step_cost

# 300 equal layers, each with a norm of cost 0: the first layer is negligible.
CHAIN = [
    unit
    for i in range(300)
    for unit in (
        Unit(f"{i}.conv", (1,), cost=1.0, block=str(i), depth=i),
        Unit(f"{i}.norm", (1,), kind="norm", block=str(i), depth=i),
    )
]
# Three layers with shares .5, .3, .2.
SMALL = [
    Unit("a", (1,), cost=5.0, block="a", depth=0),
    Unit("b", (1,), cost=3.0, block="b", depth=1),
    Unit("c", (1,), cost=2.0, block="c", depth=2),
]


def ratio(sampler, selector, **options):
    return expected_cost(sampler, CHAIN, selector, **options).ratio


def test_documented_costs():
    assert ratio(Everything(), All()) == pytest.approx(2.0, abs=2e-3)
    assert ratio(Bernoulli(0.6), TopIncrease(0.5)) == pytest.approx(1.70, abs=5e-3)
    assert ratio(Suffix("200"), TopIncrease(0.5)) == pytest.approx((3.5 + 2 / 3) / 3, abs=3e-3)
    assert ratio(Suffix("200"), TopLoss(0.5)) == pytest.approx((2.5 + 2 / 3) / 3, abs=3e-3)
    assert ratio(Suffix("200"), All()) == pytest.approx((4 + 2 / 3) / 3, abs=3e-3)
    assert ratio(Between(10**6), TopIncrease(0.5)) == pytest.approx(1.0, abs=1e-12)
    assert ratio(Every(10), All()) == pytest.approx(1.1, abs=1e-3)


@pytest.mark.parametrize(
    ("sampler", "selector", "ascend", "expected"),
    [
        (Everything(), All(), Part(0.25), 1.25),
        (Suffix(0.5), All(), Part(0.25), 3.5 / 3),
        (Everything(), Random(0.5), Part(0.5), 1.0),
        (Everything(), All(), Part(1.0), 2.0),
        (Everything(), All(), Previous(), 1.0),
        (Bernoulli(0.6), All(), Momentum(), 1.0),
        (Everything(), Random(0.5), Previous(), 0.5),
        # A selector by loss needs a forward for the samples outside the ascent pass.
        (Everything(), TopLoss(0.5), Part(0.25), (0.75 + 0.75 + 1.5) / 3),
        (Suffix(0.5), Proportional(0.5), Part(0.25), (0.5 + 0.75 + 1.5) / 3),
        (Everything(), TopIncrease(0.5), Part(0.25), (0.75 + 0.75 + 1 + 1.5) / 3),
        (Everything(), TopLoss(0.5), Previous(), 2.5 / 3),
        (Everything(), TopIncrease(0.5), Momentum(), 3.5 / 3),
        (Between(10**6), TopIncrease(0.5), Part(0.25), 1.0),
    ],
    ids=str,
)
def test_documented_costs_of_directions(sampler, selector, ascend, expected):
    assert ratio(sampler, selector, ascend=ascend) == pytest.approx(expected, abs=4e-3)


def test_a_part_by_hand():
    mask = Suffix("b").draw(SMALL, seed=0, count=0)
    cost = step_cost(SMALL, mask, TopLoss(0.5), ascend=Part(0.4), batch_size=8)
    # The ascent pass uses four of eight samples: 0.4 of 8 is 3.2.
    assert cost.ascent_forward == 0.5
    assert cost.ascent_activations == pytest.approx(0.1)
    assert cost.ascent_weights == pytest.approx(0.25)
    assert cost.scoring == 0.5
    assert cost.selection == 0.0
    assert cost.total == pytest.approx(0.85 + 0.5 + 0.5 * 2.5)
    # Without the batch size: the share itself.
    assert step_cost(SMALL, mask, TopLoss(0.5), ascend=Part(0.4)).scoring == pytest.approx(0.6)


def test_small_chain_by_hand():
    assert base_cost(SMALL) == pytest.approx(2.5)
    mask = Suffix("b").draw(SMALL, seed=0, count=0)
    cost = step_cost(SMALL, mask, TopIncrease(0.5))
    assert cost.ascent_forward == 1.0
    assert cost.ascent_activations == pytest.approx(0.2)  # into c's input, which is b's output
    assert cost.ascent_weights == pytest.approx(0.5)
    assert cost.selection == 1.0
    assert cost.descent_forward == 0.5
    assert cost.descent_backward == pytest.approx(0.75)
    assert cost.total == pytest.approx(3.95)
    assert cost.ratio == pytest.approx(3.95 / 2.5)


@pytest.mark.parametrize(
    ("selector", "selection", "descent_forward"),
    [
        (TopIncrease(0.5), 1.0, 0.5),
        (TopLoss(0.5), 0.0, 0.5),
        (Random(0.5), 0.0, 0.5),
        (Proportional(0.5), 0.0, 0.5),
        (Proportional(0.5, "increase"), 1.0, 0.5),
        (All(), 0.0, 1.0),
    ],
)
def test_passes_that_selectors_need(selector, selection, descent_forward):
    cost = step_cost(SMALL, Suffix("b").draw(SMALL, seed=0, count=0), selector)
    assert cost.selection == pytest.approx(selection)
    assert cost.descent_forward == pytest.approx(descent_forward)


def test_full_norm_needs_the_whole_backward():
    mask = Suffix("c").draw(SMALL, seed=0, count=0)
    cost = step_cost(SMALL, mask, All(), norm="full")
    assert cost.ascent_activations + cost.ascent_weights == pytest.approx(base_cost(SMALL) - 1.0)
    assert cost.descent_forward == 1.0


def test_norm_layers_cost_only_activation_gradients():
    cost = expected_cost(Only("norm", Suffix("200")), CHAIN, TopIncrease(0.5))
    assert cost.ascent_weights == 0.0
    assert cost.ascent_activations == pytest.approx(99 / 300)


def test_batch_size_gives_the_exact_share():
    mask = Everything().draw(SMALL, seed=0, count=0)
    assert step_cost(SMALL, mask, TopIncrease(0.5), batch_size=3).descent_forward == 2 / 3
    cost = step_cost(SMALL, mask, TopIncrease(0.5), batch_size=1)  # k = b: no selection pass
    assert cost.selection == 0.0
    assert cost.ratio == pytest.approx(2.0)


def test_random_suffix_is_the_mean_of_its_suffixes():
    sampler = RandomSuffix(("b", "c"), (0.25, 0.75))
    one, other = (step_cost(SMALL, mask, All()).total for mask in sampler.masks(SMALL))
    found = expected_cost(sampler, SMALL, All(), steps=4000).total
    assert found == pytest.approx(0.25 * one + 0.75 * other, abs=0.02)


@pytest.mark.parametrize(
    "options", [{"norm": "full"}, {"batch_size": 3}, {"batch_size": 1}, {"ascend": Part(0.5)}]
)
def test_a_mean_over_one_mask_is_that_mask(options):
    mask = Suffix("b").draw(SMALL, seed=0, count=0)
    expected = step_cost(SMALL, mask, TopIncrease(0.5), **options)
    assert expected_cost(Suffix("b"), SMALL, TopIncrease(0.5), **options) == expected
    assert expected != step_cost(SMALL, mask, TopIncrease(0.5))  # the option has an effect


def test_means_are_over_the_given_steps():
    late = Between(100, 110)
    assert expected_cost(late, SMALL, All(), steps=100).ratio == pytest.approx(1.0)
    assert expected_cost(late, SMALL, All(), start=100, steps=10).ratio == pytest.approx(2.0)
    assert expected_cost(late, SMALL, All(), start=90, steps=20).ratio == pytest.approx(1.5)


def test_means_are_over_the_draws_of_the_seed():
    costs = [expected_cost(Bernoulli(0.5), SMALL, All(), steps=1, seed=seed) for seed in range(8)]
    masks = [Bernoulli(0.5).draw(SMALL, seed=seed, count=0) for seed in range(8)]
    assert costs == [step_cost(SMALL, mask, All()) for mask in masks]
    assert len(set(costs)) > 1


def test_units_are_ordered_by_depth():
    shuffled = [SMALL[2], SMALL[0], SMALL[1]]
    mask = Mask((True, False, True), (1.0,) * 3)
    original = Mask((False, True, True), (1.0,) * 3)
    assert step_cost(shuffled, mask, All()) == step_cost(SMALL, original, All())


def test_bad_input():
    with pytest.raises(ESAMValueError, match="must not be empty"):
        base_cost([])
    with pytest.raises(ESAMValueError, match="must have a cost"):
        base_cost([Unit("w", (1,))])
    with pytest.raises(ESAMValueError, match="unique names"):
        step_cost([SMALL[0], SMALL[0]], Mask((True, True), (1.0, 1.0)), All())
    with pytest.raises(ESAMValueError, match="`steps` must be >= 1"):
        expected_cost(Everything(), SMALL, All(), steps=0)
    with pytest.raises(ESAMValueError, match=r"`start` must be >= 0\. Received: start=-1\."):
        expected_cost(Every(2), SMALL, All(), start=-1)
    with pytest.raises(ESAMTypeError, match="`sampler` must be a sampler"):
        expected_cost(Everything, SMALL, All())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ascend": 0.25}, ESAMTypeError, r"`ascend` must be Batch\(\), .* Received: ascend=0.25"),
        ({"ascend": Part}, ESAMTypeError, "`ascend` must be"),
        ({"norm": "Full"}, ESAMValueError, "`norm` must be one of .* Received: norm='Full'"),
        ({"selector": 0.5}, ESAMTypeError, "`selector` must be a selector"),
        ({"batch_size": 0}, ESAMValueError, "batch_size=0"),
    ],
)
def test_misspelt_options_are_not_a_cheaper_step(options, error, message):
    mask = Everything().draw(SMALL, seed=0, count=0)
    with pytest.raises(error, match=message):
        step_cost(SMALL, mask, **{"selector": TopLoss(0.5), **options})
