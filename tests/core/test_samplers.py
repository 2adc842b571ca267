"""Samplers: masks derived by hand, inclusion probabilities over many draws, and purity."""

import re

import numpy as np
import pytest

from esam_core import (
    Bernoulli,
    Between,
    ESAMTypeError,
    ESAMValueError,
    Every,
    Everything,
    Mask,
    Only,
    RandomSuffix,
    Sampler,
    Sometimes,
    Suffix,
    Unit,
)
from esam_core.draws import uniforms
from esam_core.samplers import check_sampler
from esam_core.units import block_order

UNITS = [
    Unit("stem.weight", (3, 3), block="stem", cost=4.0, depth=0),
    Unit("stem_norm.weight", (3,), kind="norm", block="stem", cost=0.0, depth=0),
    Unit("layer1.conv.weight", (3, 3), block="layer1.conv", cost=3.0, depth=1),
    Unit("layer1.conv.bias", (3,), kind="bias", block="layer1.conv", cost=0.0, depth=1),
    Unit("layer2.conv.weight", (3, 3), block="layer2.conv", cost=2.0, depth=2),
    Unit("head.weight", (3, 2), block="head", cost=1.0, depth=3),
]
ALL_SAMPLERS = [
    Bernoulli(0.6),
    Bernoulli(0.3, unit="weight"),
    Bernoulli(1.0),
    Everything(),
    Suffix("layer2"),
    Suffix(0.35),
    RandomSuffix(("stem", "layer2", 0.1)),
    Only("norm"),
    Only("*.conv.*", Bernoulli(0.5)),
    Every(3, Bernoulli(0.5)),
    Between(2, 5, Suffix("head")),
    Sometimes(0.4, RandomSuffix(("stem", "head"))),
]


def perturbed(sampler, count=0, seed=0, units=UNITS):
    """Return the names of the perturbed units."""
    mask = sampler.draw(units, seed=seed, count=count)
    return [u.name for u, m in zip(units, mask.perturbed, strict=True) if m]


@pytest.mark.parametrize("sampler", ALL_SAMPLERS, ids=repr)
class TestEverySampler:
    def test_is_a_pure_function_of_seed_and_count(self, sampler):
        first = [sampler.draw(UNITS, seed=3, count=c) for c in range(20)]
        backwards = [sampler.draw(UNITS, seed=3, count=c) for c in reversed(range(20))]
        assert first == backwards[::-1]

    def test_masks_are_well_formed(self, sampler):
        for count in range(50):
            mask = sampler.draw(UNITS, seed=1, count=count)
            assert len(mask.perturbed) == len(mask.probability) == len(UNITS)
            for m, p, scale in zip(mask.perturbed, mask.probability, mask.scale, strict=True):
                assert 0.0 <= p <= 1.0
                assert type(m) is bool
                assert scale == (1.0 / p if m else 0.0)
            assert mask.active == any(mask.perturbed)
            hash(mask)

    def test_every_draw_is_among_the_masks_it_lists(self, sampler):
        listed = sampler.masks(UNITS)
        if listed is None:
            return
        assert len(listed) == len(set(listed))
        drawn = {sampler.draw(UNITS, seed=2, count=count) for count in range(300)}
        assert drawn <= set(listed)

    def test_is_a_sampler_and_hashable(self, sampler):
        assert isinstance(sampler, Sampler)
        assert check_sampler("perturb", sampler) is sampler
        hash(sampler)
        assert sampler == eval(repr(sampler))  # reprs can be pasted


@pytest.mark.parametrize(
    "sampler",
    [
        Bernoulli(0.6),
        RandomSuffix(("stem", "layer2", "head"), (0.2, 0.3, 0.5)),
        Only("weight", Bernoulli(0.25)),
    ],
    ids=repr,
)
def test_units_are_perturbed_as_often_as_their_probability(sampler):
    n = 20_000
    drawn = [sampler.draw(UNITS, seed=5, count=c) for c in range(n)]
    share = np.mean([mask.perturbed for mask in drawn], axis=0)
    p = np.array(drawn[0].probability)
    if isinstance(sampler, Only):
        p = p * np.array([u.kind == "weight" for u in UNITS])
    assert np.all(np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n))
    # Therefore m / p has mean 1, and E epsilon is the same as without a mask.
    mean_scale, p = np.mean([mask.scale for mask in drawn], axis=0)[p > 0], p[p > 0]
    assert np.all(np.abs(mean_scale - 1) <= 5 * np.sqrt((1 - p) / p / n))


def test_bernoulli_compares_uniforms_with_beta():
    mask = Bernoulli(0.6).draw(UNITS, seed=9, count=4)
    assert mask.perturbed == tuple((uniforms(6, seed=9, count=4) < 0.6).tolist())
    assert mask.probability == (0.6,) * 6
    assert mask.weight_beta is None


def test_bernoulli_units_are_independent():
    drawn = np.array([Bernoulli(0.5).draw(UNITS, seed=0, count=c).perturbed for c in range(4000)])
    correlation = np.corrcoef(drawn.T.astype(float)) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


def test_bernoulli_of_single_weights():
    sampler = Bernoulli(0.3, unit="weight")
    masks = [sampler.draw(UNITS, seed=1, count=c) for c in range(50)]
    assert all(mask.perturbed == (True,) * 6 for mask in masks)
    assert all(mask.weight_beta == 0.3 for mask in masks)
    assert len({mask.weight_seed for mask in masks}) == 50
    assert all(0 <= mask.weight_seed < 2**63 for mask in masks)
    assert sampler.masks(UNITS) is None
    # beta = 1 perturbs everything, for both units.
    assert Bernoulli(1.0, unit="weight").draw(UNITS, seed=0, count=0).weight_beta is None


def test_beta_one_is_everything():
    assert Bernoulli(1.0).draw(UNITS, seed=0, count=0).perturbed == (True,) * 6
    assert Bernoulli(1.0).masks(UNITS) == Everything().masks(UNITS)
    assert len(Everything().masks(UNITS)) == 1


def test_a_bernoulli_mask_may_be_empty_and_keeps_its_probability():
    units = UNITS[:1]
    masks = [Bernoulli(0.1).draw(units, seed=0, count=c) for c in range(100)]
    empty = [mask for mask in masks if not mask.active]
    assert len(empty) > 50
    assert all(mask.probability == (0.1,) for mask in masks)


@pytest.mark.parametrize(
    ("start", "blocks"),
    [
        ("stem", ["stem", "layer1.conv", "layer2.conv", "head"]),
        ("layer1", ["layer1.conv", "layer2.conv", "head"]),
        ("layer1.conv", ["layer1.conv", "layer2.conv", "head"]),
        ("head", ["head"]),
        (1.0, ["stem", "layer1.conv", "layer2.conv", "head"]),
        (0.6, ["layer1.conv", "layer2.conv", "head"]),  # exactly 6 of 10
        (0.59, ["layer2.conv", "head"]),
        (0.3, ["layer2.conv", "head"]),  # in floats, 0.1 + 0.2 is slightly more than 0.3
        (0.1, ["head"]),
        (0.01, ["head"]),  # at least the last block
    ],
)
def test_suffix(start, blocks):
    names = [u.name for u in UNITS if u.block in blocks]
    assert perturbed(Suffix(start)) == names
    assert Suffix(start).draw(UNITS, seed=0, count=0).probability == (1.0,) * 6
    assert perturbed(Suffix(start), count=17, seed=5) == names


def test_a_prefix_of_a_name_does_not_match():
    units = [Unit("a", (1,), block="layer10"), Unit("b", (1,), block="layer1")]
    assert perturbed(Suffix("layer1"), units=units) == ["b"]


def test_blocks_run_in_the_order_of_their_depth():
    units = [
        Unit("head", (1,), block="head", depth=2),
        Unit("stem", (1,), block="stem", depth=0),
        Unit("body", (1,), block="body", depth=1),
        Unit("late stem", (1,), block="stem", depth=5),
    ]
    assert block_order(units) == ("stem", "body", "head")
    assert perturbed(Suffix("body"), units=units) == ["head", "body"]


def test_random_suffix_probabilities_by_hand():
    sampler = RandomSuffix(("stem", "layer2", "head"), (0.2, 0.3, 0.5))
    for mask in sampler.masks(UNITS):
        assert mask.probability == pytest.approx((0.2, 0.2, 0.2, 0.2, 0.5, 1.0))
        assert max(mask.probability) <= 1.0
    assert [sum(mask.perturbed) for mask in sampler.masks(UNITS)] == [6, 2, 1]
    assert RandomSuffix(("stem", "head")).probabilities == (0.5, 0.5)


def test_random_suffix_of_arrays():
    assert repr(RandomSuffix(np.array(["stem", "head"]), np.array([0.25, 0.75]))) == repr(
        RandomSuffix(("stem", "head"), (0.25, 0.75))
    )
    assert RandomSuffix(np.array([0.25, 0.5])) == RandomSuffix((0.25, 0.5))
    assert RandomSuffix(np.float32([0.61, 0.5])) == RandomSuffix((0.61, 0.5))


def test_only():
    assert perturbed(Only("norm")) == ["stem_norm.weight"]
    assert perturbed(Only("bias")) == ["layer1.conv.bias"]
    assert perturbed(Only("embedding")) == []
    assert perturbed(Only("layer?.conv.*")) == [u.name for u in UNITS[2:5]]
    assert perturbed(Only(lambda unit: unit.size > 6)) == [
        "stem.weight",
        "layer1.conv.weight",
        "layer2.conv.weight",
    ]
    assert perturbed(Only("weight", Suffix("layer2"))) == ["layer2.conv.weight", "head.weight"]


@pytest.mark.parametrize("kind", ["norms", "*.atention.*", "Stem.weight"])
@pytest.mark.parametrize("inner", [Everything(), Bernoulli(0.5)], ids=repr)
def test_only_refuses_strings_that_match_nothing(kind, inner):
    """A misspelt kind would silently train with only the base optimizer."""
    message = re.escape(
        "`kind` must be one of 'weight', 'bias', 'norm', 'embedding', or a pattern that matches "
        f"the name of a unit, such as 'stem.weight'. Received: kind='{kind}'."
    )
    only = Only(kind, inner)
    with pytest.raises(ESAMValueError, match=message):
        only.draw(UNITS, seed=0, count=0)
    with pytest.raises(ESAMValueError, match=message):
        Between(5, None, only).masks(UNITS)  # at the start, not when the schedule becomes active
    with pytest.raises(ESAMValueError, match=re.escape(f"Received: kind='{kind}'.")):
        only.draw([], seed=0, count=0)


def test_a_kind_or_a_function_may_match_no_unit():
    for kind in ("embedding", lambda unit: False):
        assert perturbed(Only(kind)) == []
        assert not Only(kind).masks(UNITS)[0].active


def test_only_keeps_the_inner_draw_and_probability():
    for count in range(20):
        inner = Bernoulli(0.4).draw(UNITS, seed=0, count=count)
        mask = Only("weight", Bernoulli(0.4)).draw(UNITS, seed=0, count=count)
        assert mask.probability == inner.probability
        assert mask.perturbed == tuple(
            m and u.kind == "weight" for u, m in zip(UNITS, inner.perturbed, strict=True)
        )


def test_schedules():
    def active(sampler):
        return [sampler.draw(UNITS, seed=0, count=c).active for c in range(7)]

    assert active(Every(3)) == [True, False, False, True, False, False, True]
    assert active(Every(1)) == [True] * 7
    assert active(Between(2, 4)) == [False, False, True, True, False, False, False]
    assert active(Between(5)) == [False] * 5 + [True] * 2
    assert active(Between(3, 3)) == [False] * 7
    assert active(Sometimes(1.0)) == [True] * 7


def test_schedules_do_not_rescale():
    for sampler in (Every(4, Bernoulli(0.5)), Sometimes(0.25, Bernoulli(0.5))):
        masks = [sampler.draw(UNITS, seed=0, count=c) for c in range(100)]
        active = [mask for mask in masks if mask.active]
        assert 5 < len(active) < 60
        assert all(mask.probability == (0.5,) * 6 for mask in active)


def test_sometimes_has_its_share_and_is_independent_of_its_inner_sampler():
    n = 20_000
    sampler = Sometimes(0.3, Bernoulli(0.5))
    drawn = np.array([sampler.draw(UNITS, seed=3, count=c).perturbed for c in range(n)])
    active = np.array([Sometimes(0.3).draw(UNITS, seed=3, count=c).active for c in range(n)])
    assert abs(active.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / n)
    share = drawn[active].mean(axis=0)
    assert np.all(np.abs(share - 0.5) < 5 * np.sqrt(0.25 / active.sum()))
    assert not drawn[~active].any()


def test_finite_sets_of_masks():
    assert Bernoulli(0.5).masks(UNITS) is None
    assert len(Suffix("head").masks(UNITS)) == 1
    assert len(RandomSuffix(("stem", "head")).masks(UNITS)) == 2
    assert len(Every(2, Suffix("head")).masks(UNITS)) == 2
    assert len(Every(1, Suffix("head")).masks(UNITS)) == 1
    assert Every(2, Bernoulli(0.5)).masks(UNITS) is None
    assert len(Sometimes(0.5, RandomSuffix(("stem", "head"))).masks(UNITS)) == 3
    # Two suffixes, only one of which has units of the kind: the masks still differ.
    assert len(Only("norm", RandomSuffix(("stem", "head"))).masks(UNITS)) == 2


def test_mask():
    mask = Mask((True, False, True), (0.5, 0.5, 1.0))
    assert mask.scale == (2.0, 0.0, 1.0)
    assert mask.within([False, True, True]).perturbed == (False, False, True)
    assert mask.within([True, True, True]) == mask
    assert not mask.within([False, True, False]).active
    with pytest.raises(ValueError, match="shorter"):
        mask.within([True])


def test_unit():
    assert Unit("w", (2, 3)).size == 6
    assert Unit("s", ()).size == 1
    assert Unit("none", (0, 4)).size == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Bernoulli(0.0), ESAMValueError, "`beta` must be in (0, 1]. Received: beta=0.0."),
        (lambda: Bernoulli(1.5), ESAMValueError, "`beta` must be in (0, 1]. Received: beta=1.5."),
        (lambda: Bernoulli(float("nan")), ESAMValueError, "beta=nan"),
        (lambda: Bernoulli(True), ESAMTypeError, "beta=True"),
        (lambda: Bernoulli("0.5"), ESAMTypeError, "beta='0.5'"),
        (lambda: Bernoulli(5e-324), ESAMValueError, "`beta` must be at least 2**-23"),
        (lambda: Bernoulli(1e-39, unit="weight"), ESAMValueError, "Received: beta=1e-39."),
        (lambda: Bernoulli(2.0**-24), ESAMValueError, "`beta` must be at least 2**-23"),
        (lambda: Bernoulli(0.5, unit="row"), ESAMValueError, "`unit` must be one of"),
        (lambda: Suffix(""), ESAMValueError, "`start` must be a block's name"),
        (lambda: Suffix(0.0), ESAMValueError, "`start` must be in (0, 1]"),
        (lambda: Suffix(None), ESAMTypeError, "start=None"),
        (lambda: RandomSuffix(()), ESAMValueError, "`starts` must be a non-empty sequence"),
        (lambda: RandomSuffix([]), ESAMValueError, "Received: starts=[]."),
        (lambda: RandomSuffix({"a", "b"}), ESAMTypeError, "`starts` must be a non-empty sequence"),
        (lambda: RandomSuffix(np.array(0.5)), ESAMTypeError, "starts=array(0.5)"),
        (
            lambda: RandomSuffix(("a", "b"), {0.25, 0.75}),
            ESAMTypeError,
            "`probabilities` must be a sequence",
        ),
        (lambda: RandomSuffix("stem"), ESAMTypeError, "starts='stem'"),
        (lambda: RandomSuffix(("a", "b"), (0.5,)), ESAMValueError, "must be 2 numbers"),
        (lambda: RandomSuffix(("a", "b"), (0.5, 0.6)), ESAMValueError, "add up to 1"),
        (lambda: RandomSuffix((0.5,), None), ESAMTypeError, "Received: probabilities=None."),
        (lambda: RandomSuffix((0.5,), 1.0), ESAMTypeError, "`probabilities` must be a sequence"),
        (lambda: RandomSuffix((0.5,), ""), ESAMTypeError, "Received: probabilities=''."),
        (lambda: Only(""), ESAMTypeError, "`kind` must be one of"),
        (lambda: Only(3), ESAMTypeError, "kind=3"),
        (lambda: Only("norm", Everything), ESAMTypeError, "`inner` must be a sampler"),
        (lambda: Every(0), ESAMValueError, "`n` must be >= 1"),
        (lambda: Every(2.0), ESAMTypeError, "`n` must be an integer"),
        (lambda: Between(-1), ESAMValueError, "`start` must be >= 0"),
        (lambda: Between(5, 4), ESAMValueError, "`stop` must be >= 5"),
        (lambda: Sometimes(0.0), ESAMValueError, "`p` must be in (0, 1]"),
        (lambda: Unit("w", (1,), kind="kernel"), ESAMValueError, "`kind` must be one of"),
        (lambda: Unit("w", (1,), cost=-1.0), ESAMValueError, "`cost` must be finite and >= 0"),
        (lambda: Unit("w", (1,), depth=-1), ESAMValueError, "`depth` must be >= 0"),
        (lambda: check_sampler("perturb", 0.5), ESAMTypeError, "perturb=0.5"),
        (lambda: check_sampler("perturb", Bernoulli), ESAMTypeError, "must be a sampler"),
    ],
)
def test_errors_name_the_requirement_and_the_value(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "sampler",
    [Bernoulli(0.5), Bernoulli(0.5, unit="weight"), RandomSuffix(("stem",)), Sometimes(0.5)],
    ids=repr,
)
def test_draws_refuse_counts_below_0(sampler):
    with pytest.raises(ESAMValueError, match=re.escape("`count` must be in [0, 1844674407370955")):
        sampler.draw(UNITS, seed=0, count=-1)


def test_suffix_errors_list_the_blocks():
    with pytest.raises(ESAMValueError, match=r"'stem', 'layer1.conv', 'layer2.conv', 'head'"):
        Suffix("layer9").draw(UNITS, seed=0, count=0)


def test_a_share_needs_costs():
    units = [Unit("w", (1,), block="a"), Unit("v", (1,), block="b")]
    with pytest.raises(ESAMValueError, match="needs units with a known cost"):
        Suffix(0.5).draw(units, seed=0, count=0)
    assert Suffix(0.5).draw(units[:1], seed=0, count=0).perturbed == (True,)  # the only block


def test_custom_samplers():
    class Alternating:
        needs_blocks = False

        def draw(self, units, *, seed, count, stream=0):
            return Mask(tuple(t % 2 == count % 2 for t in range(len(units))), (1.0,) * len(units))

        def masks(self, units):
            return (
                self.draw(units, seed=0, count=0),
                self.draw(units, seed=0, count=1),
            )

    assert perturbed(Only("weight", Alternating()), count=0) == [
        "stem.weight",
        "layer1.conv.weight",
        "layer2.conv.weight",
    ]
