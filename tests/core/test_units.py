"""Masks are validated, and results for a model's units are cached."""

import re
import sys
import threading
from dataclasses import dataclass, replace

import pytest

from esam_core import ESAMTypeError, ESAMValueError, Mask, Only, Suffix, Unit
from esam_core.units import cache_for_units, names_a_norm


def test_results_are_cached_only_for_the_same_tuple():
    calls = []

    @cache_for_units
    def counted(what, units):
        calls.append(what)
        return len(units)

    units = (Unit("a", (1,)), Unit("b", (1,)))
    assert [counted("x", units) for _ in range(3)] == [2, 2, 2] and calls == ["x"]
    assert counted("y", units) == 2 and counted("x", (*units, Unit("c", (1,)))) == 3
    listed = list(units)
    assert counted("x", listed) == 2
    listed.append(Unit("c", (1,)))
    assert counted("x", listed) == 3  # a list may change, so its results are not cached
    assert calls == ["x", "y", "x", "x", "x"]
    for i in range(100):  # old results are removed
        counted(str(i), units)
    assert counted("x", units) == 2 and calls[-1] == "x"


def test_valid_masks():
    assert Mask((), ()).scale == ()
    assert Mask((True, False), (1.0, 0.0)).scale == (1.0, 0.0)
    assert Mask((True,), (5e-324,), 5e-324, 0).scale == (float("inf"),)
    assert replace(Mask((True,), (0.5,)), rho_factor=2).rho_factor == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((True,), (1.0, 1.0)), ESAMValueError, "Received: 2 numbers for 1 units."),
        (((True,), (2.0,)), ESAMValueError, "`probability` must be in [0, 1]"),
        (((True,), (-0.5,)), ESAMValueError, "Received: -0.5 for a unit with perturbed=True."),
        (((False,), (-0.5,)), ESAMValueError, "Received: -0.5 for a unit with perturbed=False."),
        (((True, False), (0.0, 0.0)), ESAMValueError, "> 0 for units that are perturbed"),
        (((True,), (float("nan"),)), ESAMValueError, "Received: nan for a unit"),
        (((True,), (0.5,), 0.5), ESAMValueError, "weight_beta=0.5, weight_seed=None."),
        (((True,), (0.5,), None, 7), ESAMValueError, "weight_beta=None, weight_seed=7."),
        (((True,), (0.5,), 1.5, 7), ESAMValueError, "`weight_beta` must be in (0, 1]"),
        (((True,), (0.5,), 0.5, -1), ESAMValueError, "`weight_seed` must be in [0, 922"),
        (((True,), (0.5,), 0.5, 0.5), ESAMTypeError, "`weight_seed` must be an integer"),
        (((True,), (0.5,), None, None, 0.0), ESAMValueError, "`rho_factor` must be finite and > 0"),
    ],
)
def test_invalid_masks_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Mask(*arguments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("LayerNorm", "BatchNorm2d", "LlamaRMSNorm", "layernorm")),
        *(
            (name, True)
            for name in ("RMSNormalization", "GroupNormalisation", "batch_norm", "NORM")
        ),
        *((name, False) for name in ("Normal", "NormalHead", "LogNormal", "Linear")),
        *((name, False) for name in ("SpectralNorm", "spectral_norm", "WeightNormConv2d")),
    ],
)
def test_names_of_normalisation_layers(name, expected):
    assert names_a_norm(name) is expected


@dataclass
class Larger:
    """A choice of units that is not hashable, so that its results cannot be cached."""

    size: int

    def __call__(self, unit):
        return unit.size > self.size


def test_a_choice_that_is_not_hashable():
    units = (Unit("a", (1,)), Unit("b", (7,)))
    mask = Only(Larger(6)).draw(units, seed=0, count=0)
    assert mask == Only(lambda unit: unit.size > 6).draw(units, seed=0, count=0)
    assert mask.perturbed == (False, True)


def test_the_size_of_a_huge_shape():
    assert Unit("w", (2**40, 2**40)).size == 2**80


def test_masks_are_drawn_in_many_threads_at_a_time():
    """Each draw adds to the cache, which is full."""
    before, errors = sys.getswitchinterval(), []
    samplers = [Suffix(f"b{i}") for i in range(0, 40, 7)]

    def draw():
        for _ in range(60):
            units = tuple(Unit(f"w{i}", (1,), block=f"b{i}", depth=i) for i in range(40))
            try:
                for sampler in samplers:
                    sampler.draw(units, seed=0, count=0)
            except Exception as error:
                errors.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=draw) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
