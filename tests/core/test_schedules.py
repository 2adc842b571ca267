"""Schedules that are defined by shares of the run, or that scale rho."""

import math
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
    Only,
    Suffix,
    Unit,
)

UNITS = [Unit("a", (2,), block="a"), Unit("b", (2,), block="b", depth=1)]


def factors(sampler, n=7):
    """Return the factors of rho in the first n steps, with 0 for base steps."""
    masks = [sampler.draw(UNITS, seed=0, count=c) for c in range(n)]
    return [mask.rho_factor if mask.active else 0.0 for mask in masks]


def test_every_can_multiply_rho_by_n():
    assert factors(Every(3, scale_rho=True)) == [3.0, 0, 0, 3.0, 0, 0, 3.0]
    assert factors(Every(3)) == [1.0, 0, 0, 1.0, 0, 0, 1.0]
    assert factors(Every(1, scale_rho=True)) == [1.0] * 7
    # One schedule within another: the factors multiply.
    assert factors(Every(2, Every(3, scale_rho=True), scale_rho=True)) == [6.0, *[0] * 5, 6.0]
    assert factors(Only("weight", Every(3, scale_rho=True))) == [3.0, 0, 0, 3.0, 0, 0, 3.0]


def test_the_factor_is_not_a_probability():
    """The factor is not part of m / p, which enters the norm."""
    mask = Every(4, Suffix("b"), scale_rho=True).draw(UNITS, seed=0, count=0)
    assert mask.scale == (0.0, 1.0)
    assert mask.probability == (1.0, 1.0)
    assert mask.within([True, True]) == mask


def test_the_mean_radius_stays_the_same():
    for n in (1, 2, 5, 10):
        assert np.mean(factors(Every(n, scale_rho=True), n=100 * n)) == pytest.approx(1.0)


@pytest.mark.parametrize("inner", [Suffix("b"), Bernoulli(0.5)], ids=repr)
def test_masks_that_are_listed_are_those_that_are_drawn(inner):
    sampler = Every(2, inner, scale_rho=True)
    listed = sampler.masks(UNITS)
    if listed is not None:
        assert {sampler.draw(UNITS, seed=0, count=c) for c in range(4)} == set(listed)


class TestShareOfTheRun:
    def test_by_hand(self):
        assert Between.of_run(0.25, 0.75, steps=8) == Between(2, 6)
        assert Between.of_run(0.0, steps=8) == Between(0)
        assert Between.of_run(1.0, steps=8) == Between(8)
        assert Between.of_run(0.5, 0.5, steps=8) == Between(4, 4)
        assert Between.of_run(0.5, steps=8, inner=Suffix("b")) == Between(4, None, Suffix("b"))
        # Perturbing starts once at least the share has passed: half of 7 steps starts with the
        # fifth.
        assert Between.of_run(0.5, steps=7) == Between(4)
        # 0.88 is 22 / 25, and 22 * 2**28 is too large for an int32.
        assert Between.of_run(0.88, steps=np.int32(2**28)) == Between.of_run(0.88, steps=2**28)
        assert Between.of_run(np.float32(0.61), steps=100) == Between(61)

    @pytest.mark.parametrize("steps", [1, 3, 100, 391, 78_000])
    def test_shares_of_the_steps_are_exact(self, steps):
        for percent in range(101):
            start = Between.of_run(percent / 100, steps=steps).start
            assert start == -(-percent * steps // 100)  # in integers, without rounding


COSINE = tuple(0.1 * (1 + math.cos(math.pi * i / 1000)) / 2 for i in range(1000))
STEPPED = (0.1,) * 500 + (0.01,) * 300 + (0.001,) * 200


class TestShareOfTheLearningRate:
    @pytest.mark.parametrize("rates", [COSINE, STEPPED], ids=["cosine", "steps"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.88, 0.997])
    def test_late_means_the_same_under_any_schedule(self, rates, share):
        start = Between.of_learning_rate(share, rates=rates).start
        assert math.fsum(rates[:start]) >= share * math.fsum(rates) * (1 - 1e-12)
        assert math.fsum(rates[: start - 1]) < share * math.fsum(rates)

    def test_the_number_in_the_docstring(self):
        """Under a cosine the last 12 % of the steps contain 0.3 % of the sum."""
        assert Between.of_learning_rate(0.997, rates=COSINE).start == pytest.approx(880, abs=5)

    def test_a_constant_rate_is_the_share_of_the_run(self):
        for rate in (0.1, 0.3, 1e-5):
            found = Between.of_learning_rate(0.5, 0.9, rates=[rate] * 90)
            assert found == Between.of_run(0.5, 0.9, steps=90) == Between(45, 81)

    def test_a_function_and_a_list(self):
        listed = Between.of_learning_rate(0.3, 0.8, rates=STEPPED)
        called = Between.of_learning_rate(0.3, 0.8, rates=lambda count: STEPPED[count], steps=1000)
        assert listed == called
        assert listed == Between.of_learning_rate(0.3, 0.8, rates=np.array(STEPPED), steps=1000)

    def test_warm_up_from_zero(self):
        assert Between.of_learning_rate(0.0, rates=[0.0, 0.0, 1.0, 1.0]) == Between(0)
        assert Between.of_learning_rate(0.5, rates=[0.0, 0.0, 1.0, 1.0]) == Between(3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Every(2, scale_rho=1), ESAMTypeError, "`scale_rho` must be True or False"),
        (lambda: Between.of_run(1.5, steps=3), ESAMValueError, "`start` must be in [0, 1]"),
        (lambda: Between.of_run(-0.5, steps=3), ESAMValueError, "start=-0.5"),
        (lambda: Between.of_run(0.5, 0.4, steps=3), ESAMValueError, "`stop` must be in [start, 1]"),
        (lambda: Between.of_run("late", steps=3), ESAMTypeError, "start='late'"),
        (lambda: Between.of_run(0.5, steps=0), ESAMValueError, "`steps` must be >= 1"),
        (lambda: Between.of_run(0.5, steps=2.5), ESAMTypeError, "steps=2.5"),
        (lambda: Between.of_run(0.5, steps=3, inner=0.5), ESAMTypeError, "`inner` must be a"),
        (
            lambda: Between.of_learning_rate(0.5, rates=lambda _: 0.1),
            ESAMTypeError,
            "`steps` must be an integer >= 1 if `rates` is a function. Received: steps=None.",
        ),
        (lambda: Between.of_learning_rate(0.5, rates=0.1), ESAMTypeError, "rates=0.1"),
        (lambda: Between.of_learning_rate(0.5, rates={0.1}), ESAMTypeError, "rates={0.1}"),
        (lambda: Between.of_learning_rate(0.5, rates=np.ones((2, 2))), ESAMTypeError, "rates=arr"),
        (lambda: Between.of_learning_rate(0.5, rates="0.1"), ESAMTypeError, "rates='0.1'"),
        (lambda: Between.of_learning_rate(0.5, rates=[]), ESAMValueError, "contain a number > 0"),
        (
            lambda: Between.of_learning_rate(0.5, rates=[0.0]),
            ESAMValueError,
            "contain a number > 0",
        ),
        (lambda: Between.of_learning_rate(0.5, rates=[0.1, -0.1]), ESAMValueError, "rates=-0.1"),
        (lambda: Between.of_learning_rate(0.5, rates=[math.inf]), ESAMValueError, "rates=inf"),
        (
            lambda: Between.of_learning_rate(0.5, rates=[0.1, 0.1], steps=3),
            ESAMValueError,
            "Received: steps=3, 2 rates.",
        ),
    ],
)
def test_errors_name_the_requirement_and_the_value(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_they_are_plain_samplers():
    """Only two numbers are saved: the learning rates are not needed again."""
    sampler = Between.of_learning_rate(0.5, rates=[0.1] * 10)
    assert sampler == Between(5, None, Everything())
    assert [sampler.draw(UNITS, seed=0, count=c).active for c in (4, 5, 10**6)] == [
        False,
        True,
        True,
    ]
