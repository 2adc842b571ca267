"""Selectors: k in exact arithmetic, ties, and expectations of random selections."""

import itertools
import re

import numpy as np
import pytest

from esam_core import (
    All,
    ESAMTypeError,
    ESAMValueError,
    Proportional,
    Random,
    Selector,
    TopIncrease,
    TopLoss,
)
from esam_core.directions import Part, climbing_indices
from esam_core.selectors import (
    check_selector,
    inclusion_probabilities,
    random_indices,
    select,
    subset_size,
    systematic_indices,
    systematic_offset,
    top_indices,
)


@pytest.mark.parametrize(
    ("gamma", "b", "k"),
    [
        (0.5, 16, 8),  # a strict threshold keeps 7
        (0.5, 2, 1),
        (0.5, 1, 1),
        (0.5, 7, 4),
        (0.29, 100, 29),  # int(100 * 0.29) is 28
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.1, 10, 1),
        (0.99, 100, 99),
        (0.999, 100, 100),
        (1.0, 13, 13),
        (1e-9, 5, 1),
        (1 / 3, 3, 1),
        (1 / 3, 128, 43),
        (2 / 3, 3, 2),
        (0.6, 5, 3),
        (0.7, 1000, 700),
    ],
)
def test_k(gamma, b, k):
    assert subset_size(gamma, b) == k


def test_k_of_every_percentage_is_exact():
    for percent in range(1, 101):
        for b in (1, 7, 32, 100, 125, 128, 512):
            assert subset_size(percent / 100, b) == max(1, -(-percent * b // 100))


def test_no_k_of_an_empty_batch():
    with pytest.raises(ESAMValueError, match=r"`batch_size` must be >= 1\. Received: batch_size=0"):
        subset_size(0.5, 0)


@pytest.mark.parametrize("gamma", [2, 0, -0.5, 1.0 + 1e-9, float("nan")])
def test_no_k_of_a_gamma_outside_0_1(gamma):
    with pytest.raises(ESAMValueError, match=f"Received: gamma={gamma}"):
        subset_size(gamma, 10)


def test_k_of_invalid_types_and_of_numpy_numbers():
    with pytest.raises(ESAMTypeError, match="`gamma` must be a number"):
        subset_size("0.5", 10)
    assert subset_size(np.float32(0.5), 10) == 5
    assert subset_size(np.float32(0.61), 100) == 61  # it is stored as 0.6100000143
    assert subset_size(np.float16(0.07), np.int32(100)) == 7


def test_top_indices_by_hand():
    assert top_indices(np.array([0.1, 3.0, -1.0, 2.0]), 2).tolist() == [1, 3]
    assert top_indices(np.array([5.0, 4.0, 3.0]), 2).tolist() == [0, 1]


def test_ties_go_to_the_lower_index():
    assert top_indices(np.zeros(6), 3).tolist() == [0, 1, 2]
    assert top_indices(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert top_indices(np.array([0.0, -0.0, 0.0]), 1).tolist() == [0]


def test_many_ties_among_many_samples():
    """An unstable sort is visible only with many elements."""
    scores = np.repeat([1.0, 2.0, 3.0], 100)
    np.random.Generator(np.random.PCG64(0)).shuffle(scores)
    expected = np.concatenate([np.flatnonzero(scores == 3.0), np.flatnonzero(scores == 2.0)[:50]])
    assert top_indices(scores, 150).tolist() == sorted(expected.tolist())


def test_nan_counts_as_infinite():
    assert top_indices(np.array([np.inf, np.nan]), 1).tolist() == [0]
    assert top_indices(np.array([np.nan, np.inf]), 1).tolist() == [0]
    assert top_indices(np.array([1.0, np.nan, 5.0, np.inf]), 2).tolist() == [1, 3]
    assert top_indices(np.array([1.0, 2.0, -np.inf, np.nan]), 1).tolist() == [3]


def test_top_increase():
    before, after = np.array([1.0, 5.0, 2.0, 0.0]), np.array([2.0, 5.1, 2.5, 0.7])
    kept = select(TopIncrease(0.5), before, after, seed=0, count=0)
    assert kept.indices.tolist() == [0, 3]
    assert kept.weights.tolist() == [0.5, 0.5]
    assert kept.threshold == pytest.approx(0.7)  # alpha: the k-th largest increase


def test_top_loss_needs_no_perturbed_losses():
    kept = select(TopLoss(0.5), np.array([1.0, 5.0, 2.0, 0.0]), None, seed=0, count=0)
    assert kept.indices.tolist() == [1, 2]
    assert kept.threshold is None


@pytest.mark.parametrize(
    "selector",
    [TopIncrease(0.9), TopLoss(0.9), Random(0.9), Proportional(0.9), All(), TopIncrease(1.0)],
    ids=repr,
)
def test_selecting_all_samples_gives_the_plain_mean(selector):
    """k = ceil(.9 * 4) = b: for every selector, w = 1/b and nothing is drawn."""
    kept = select(selector, np.arange(4.0), None, seed=0, count=0)
    assert kept.indices.tolist() == [0, 1, 2, 3]
    assert kept.weights.tolist() == [0.25] * 4


def test_increase_needs_the_perturbed_losses():
    with pytest.raises(ESAMValueError, match="needs the perturbed losses"):
        select(TopIncrease(0.5), np.zeros(4), None, seed=0, count=0)


def test_random_is_uniform_over_subsets():
    n, b, k = 12_000, 5, 2
    seen = dict.fromkeys(itertools.combinations(range(b), k), 0)
    for count in range(n):
        seen[tuple(random_indices(b, k, seed=1, count=count).tolist())] += 1
    expected = n / len(seen)
    chi_square = sum((found - expected) ** 2 / expected for found in seen.values())
    assert chi_square < 33  # 9 degrees of freedom: passed with probability 1 - 1e-4


def test_random_depends_only_on_seed_and_count():
    first = select(Random(0.25), np.zeros(16), None, seed=3, count=9)
    again = select(Random(0.25), np.ones(16), None, seed=3, count=9)
    other = select(Random(0.25), np.zeros(16), None, seed=3, count=10)
    assert first.indices.tolist() == again.indices.tolist() != other.indices.tolist()
    assert first.weights.tolist() == [0.25] * 4


class TestInclusionProbabilities:
    def test_equal_scores_are_uniform(self):
        assert inclusion_probabilities(np.full(8, 3.0), 2, 1.0) == pytest.approx(np.full(8, 0.25))

    def test_all_zero_scores_are_uniform(self):
        assert inclusion_probabilities(np.zeros(8), 2, 1.0).tolist() == [0.25] * 8

    def test_proportional_by_hand(self):
        # Mean 2, floor 1: q = 3, 4, 5 of 12; k = 1.
        pi = inclusion_probabilities(np.array([1.0, 2.0, 3.0]), 1, 1.0)
        assert pi == pytest.approx([3 / 12, 4 / 12, 5 / 12])

    def test_certain_samples_leave_the_rest_to_the_others(self):
        # Mean 4, floor .25: q = 13, 1, 3, 3 of 20; k = 2: 1.3 is certain, 1 + 3 + 3 share 1.
        pi = inclusion_probabilities(np.array([12.0, 0.0, 2.0, 2.0]), 2, 0.25)
        assert pi == pytest.approx([1.0, 1 / 7, 3 / 7, 3 / 7])

    def test_one_certain_sample_may_make_another_certain(self):
        # Mean 25.5, floor .01: q is about 100, 2, .3, .3. k = 2: 100 is certain, then 2 of 2.5
        # gives .8; k = 3: 2 of the remaining draws make it certain too.
        scores = np.array([100.0, 2.0, 0.0, 0.0])
        assert inclusion_probabilities(scores, 3, 0.01) == pytest.approx([1.0, 1.0, 0.5, 0.5])

    def test_k_equal_b_takes_all(self):
        assert inclusion_probabilities(np.array([9.0, 1.0, 0.0]), 3, 0.5).tolist() == [1.0] * 3

    def test_negative_scores_count_as_zero(self):
        pi = inclusion_probabilities(np.array([-5.0, 0.0, 3.0]), 1, 1.0)
        assert pi == pytest.approx([1 / 6, 1 / 6, 4 / 6])

    def test_scores_that_are_not_finite_give_a_uniform_draw(self):
        for bad in (np.nan, np.inf):
            assert inclusion_probabilities(np.array([1.0, bad]), 1, 1.0).tolist() == [0.5, 0.5]

    def test_bounds_sum_and_order_on_random_scores(self):
        generator = np.random.Generator(np.random.PCG64(1))
        for _ in range(300):
            b = int(generator.integers(1, 40))
            k = int(generator.integers(1, b + 1))
            scores = generator.exponential(size=b) ** 3
            floor = float(generator.uniform(0.01, 2.0))
            pi = inclusion_probabilities(scores, k, floor)
            assert pi.sum() == pytest.approx(k)
            assert pi.min() > 0.0
            assert pi.max() <= 1.0
            assert np.all(np.diff(pi[np.argsort(scores)]) >= -1e-12)

    def test_with_a_floor_of_one_no_weight_is_over_two_over_k(self):
        scores = np.array([1000.0] + [0.0] * 31)
        for k in (1, 4, 16, 31):
            pi = inclusion_probabilities(scores, k, 1.0)
            assert (1.0 / (32 * pi)).max() <= 2.0 / k + 1e-12


class TestSystematicSample:
    def test_by_hand(self):
        pi = np.array([0.5, 0.25, 0.75, 0.5])  # ends: .5, .75, 1.5, 2
        assert systematic_indices(pi, 0.0).tolist() == [0, 2]
        assert systematic_indices(pi, 0.49).tolist() == [0, 2]
        assert systematic_indices(pi, 0.5).tolist() == [1, 3]
        assert systematic_indices(pi, 0.99).tolist() == [2, 3]

    def test_exactly_k_and_none_twice(self):
        generator = np.random.Generator(np.random.PCG64(2))
        for _ in range(300):
            b = int(generator.integers(2, 50))
            k = int(generator.integers(1, b))
            pi = inclusion_probabilities(generator.exponential(size=b) ** 2, k, 0.1)
            for offset in (0.0, float(generator.uniform()), np.nextafter(1.0, 0.0)):
                indices = systematic_indices(pi, offset)
                assert len(indices) == k
                assert np.all(np.diff(indices) > 0)
                assert indices.max() < b

    def test_each_sample_has_its_probability(self):
        pi = inclusion_probabilities(np.array([0.0, 1.0, 4.0, 0.5, 2.0]), 2, 0.3)
        grid = (np.arange(20_000) + 0.5) / 20_000  # all offsets, evenly spaced
        hits = np.zeros(5)
        for offset in grid:
            hits[systematic_indices(pi, offset)] += 1
        assert hits / grid.size == pytest.approx(pi, abs=2e-4)


@pytest.mark.parametrize("score", ["loss", "increase"])
def test_proportional_averages_to_the_whole_batch(score):
    """E[sum of w_i x_i] = mean of x, for any x: the weights correct for the selection."""
    generator = np.random.Generator(np.random.PCG64(3))
    losses = generator.exponential(size=12)
    perturbed = losses + generator.normal(size=12)
    x = generator.normal(size=12)
    selector = Proportional(0.25, score=score, floor=0.5)
    n = 6000
    found = np.empty(n)
    for count in range(n):
        kept = select(selector, losses, perturbed, seed=4, count=count)
        assert len(kept.indices) == 3
        found[count] = kept.weights @ x[kept.indices]
    assert abs(found.mean() - x.mean()) < 5 * found.std() / np.sqrt(n)


def test_proportional_does_not_depend_on_the_part():
    """Otherwise a sample's weight is wrong on the steps on which it climbs."""
    n, share, gamma = 3000, 0.25, 0.5
    both = np.zeros(8)
    for count in range(n):
        part = climbing_indices(Part(share), 8, seed=1, count=count)
        kept = select(Proportional(gamma), np.ones(8), None, seed=1, count=count).indices
        both[np.intersect1d(part, kept)] += 1
    expected = share * gamma
    assert np.all(np.abs(both / n - expected) < 5 * np.sqrt(expected * (1 - expected) / n))


def test_proportional_uses_the_offset_of_the_step():
    losses = np.array([1.0, 2.0, 3.0, 4.0])
    for count in range(10):
        pi = inclusion_probabilities(losses, 2, 1.0)
        offset = systematic_offset(seed=5, count=count)
        kept = select(Proportional(0.5), losses, None, seed=5, count=count)
        assert kept.indices.tolist() == systematic_indices(pi, offset).tolist()
        assert kept.weights.tolist() == (1.0 / (4 * pi[kept.indices])).tolist()


@pytest.mark.parametrize(
    "selector", [TopIncrease(0.3), TopLoss(0.3), Random(0.3), Proportional(0.3), All()], ids=repr
)
def test_every_selector(selector):
    assert isinstance(selector, Selector)
    assert check_selector("select", selector) is selector
    assert selector == eval(repr(selector))
    kept = select(selector, np.arange(10.0), np.arange(10.0) ** 2, seed=0, count=0)
    assert len(kept.indices) == len(kept.weights) == subset_size(selector.gamma, 10)
    assert np.all(np.diff(kept.indices) > 0)
    assert kept.threshold == pytest.approx(
        np.sort(np.arange(10.0) ** 2 - np.arange(10.0))[10 - len(kept.indices)]
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TopIncrease(0.0),
            ESAMValueError,
            "`gamma` must be in (0, 1]. Received: gamma=0.0.",
        ),
        (lambda: TopLoss(1.5), ESAMValueError, "`gamma` must be in (0, 1]. Received: gamma=1.5."),
        (lambda: Random("half"), ESAMTypeError, "gamma='half'"),
        (lambda: Proportional(0.5, score="size"), ESAMValueError, "`score` must be one of"),
        (lambda: Proportional(0.5, score=None), ESAMValueError, "score=None"),
        (lambda: Proportional(0.5, floor=0.0), ESAMValueError, "`floor` must be finite and > 0"),
        (lambda: check_selector("select", 0.5), ESAMTypeError, "select=0.5"),
        (lambda: check_selector("select", TopLoss), ESAMTypeError, "must be a selector"),
    ],
)
def test_errors_name_the_requirement_and_the_value(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("floor", [5e-324, 1e-7, 1e7, 1e308])
def test_a_floor_that_sums_cannot_hold_is_refused(floor):
    with pytest.raises(ESAMValueError, match=r"`floor` must be in \[1e-06, 1e\+06\]"):
        Proportional(0.5, floor=floor)


@pytest.mark.parametrize("floor", [1e-6, 1e6])
def test_the_least_and_the_largest_floor(floor):
    for scores in ([0.0, 0.0, 8.0, 0.0], [1e-300, 0.0, 0.0, 1e300], [1.0, 2.0, 3.0, 4.0]):
        pi = inclusion_probabilities(np.array(scores), 2, floor)
        assert pi.sum() == pytest.approx(2.0) and (pi > 0).all()


@pytest.mark.parametrize(
    ("losses", "perturbed"), [((4,), (1,)), ((4,), (4, 1)), ((4, 1), (4, 1)), ((), None)]
)
def test_losses_of_other_shapes_are_refused(losses, perturbed):
    with pytest.raises(ESAMValueError, match=r"must have the same shape, \(b,\)"):
        select(
            *(TopIncrease(0.5), np.zeros(losses)),
            None if perturbed is None else np.zeros(perturbed),
            seed=0,
            count=0,
        )
