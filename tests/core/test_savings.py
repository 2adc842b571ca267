"""g(N, beta): the savings by counting masks, and the fit on data with known constants."""

import itertools

import numpy as np
import pytest

from esam_core import ESAMValueError
from esam_core.savings import early_stop, fit_savings, savings


@pytest.mark.parametrize("beta", [0.3, 0.6, 0.9])
def test_early_stop_is_the_expectation_over_all_masks(beta):
    n = 5
    expected = 0.0
    for mask in itertools.product((False, True), repeat=n):
        probability = np.prod([beta if m else 1 - beta for m in mask])
        spared = mask.index(True) if any(mask) else n
        expected += probability * spared / n
    assert early_stop(n, beta) == pytest.approx(expected, rel=1e-12)


def test_limits():
    assert savings(7, 1.0, 0.3, 0.1) == 0.0
    assert savings(1, 0.4, 0.3, 0.1) == pytest.approx(0.4 * 0.6)
    # Independent masks rarely stop a deep backward early.
    assert early_stop(100, 0.6) < 0.01


@pytest.mark.parametrize(("k1", "k2"), [(0.3185, 0.1310), (0.3143, 0.0737)])
def test_fit_recovers_the_constants_within_its_standard_errors(k1, k2):
    """With the paper's constants, and noise similar to that of timings."""
    rows = list(itertools.product((1, 2, 4, 8), (0.3, 0.5, 0.7, 0.9)))
    generator = np.random.default_rng(0)
    misses = []
    for _ in range(200):
        noise = 0.005 * generator.standard_normal(len(rows))
        saved = [savings(n, b, k1, k2) + e for (n, b), e in zip(rows, noise, strict=True)]
        fit = fit_savings(*zip(*rows, strict=True), saved)
        misses += [(fit.k1 - k1) / fit.k1_error, (fit.k2 - k2) / fit.k2_error]
        assert fit.residual == pytest.approx(0.005, rel=0.8)
    # Standardised errors have the standard deviation of Student's t, 1.08 for 14 degrees of
    # freedom.
    assert np.std(misses) == pytest.approx(1.08, abs=0.15)
    assert abs(np.mean(misses)) < 0.2


def test_bad_input():
    with pytest.raises(ESAMValueError, match="the same length, three or more"):
        fit_savings([1, 2], [0.5, 0.5], [0.1, 0.2])
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ESAMValueError, match="`saved` must be a sequence of finite numbers"):
            fit_savings([1, 2, 4, 8], [0.2, 0.4, 0.6, 0.8], [0.1, 0.2, wrong, 0.1])
    with pytest.raises(ESAMValueError, match=r"Received: saved=0\.1\."):
        fit_savings([1, 2, 4], [0.2, 0.4, 0.6], 0.1)
    with pytest.raises(ESAMValueError, match="beta=nan"):
        fit_savings([1, 2, 4], [0.2, float("nan"), 0.6], [0.1, 0.2, 0.1])
    with pytest.raises(ESAMValueError, match="must vary"):
        fit_savings([1, 1, 1], [0.2, 0.5, 0.9], [0.1, 0.2, 0.3])
    with pytest.raises(ESAMValueError, match=r"`beta` must be in \(0, 1\]"):
        savings(3, 0.0, 0.1, 0.1)
