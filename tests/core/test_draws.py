"""Draws: compared with Philox implemented from its definition, and as pure functions."""

import numpy as np
import pytest

from esam_core import ESAMTypeError, ESAMValueError
from esam_core.draws import SELECTION_STREAM, derived_seed, uniforms

_WORD = (1 << 64) - 1
_ESAM = 0x4553414D


def philox(counter, key):
    """Return the four words of Philox 4x64, 10 rounds (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [
            (high >> 64) ^ c[1] ^ k[0],
            high & _WORD,
            (low >> 64) ^ c[3] ^ k[1],
            low & _WORD,
        ]
        k = [(k[0] + 0x9E3779B97F4A7C15) & _WORD, (k[1] + 0xBB67AE8584CAA73B) & _WORD]
    return c


def test_the_cipher_of_this_test_is_philox():
    """The published known answer for a counter and key of zeros."""
    assert philox([0, 0, 0, 0], [0, 0]) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize(
    ("seed", "count", "stream"),
    [(0, 0, 0), (7, 3, 0), (2**63 - 1, 10**9, 2), (5, 1, SELECTION_STREAM), (2**64 - 1, 0, 1)],
)
def test_uniforms_are_the_upper_bits_of_philox(seed, count, stream):
    # NumPy adds one to the counter before each block of four words.
    words = [w for i in range(1, 4) for w in philox([i, 0, count, stream], [seed, _ESAM])]
    expected = [(word >> 11) * 2.0**-53 for word in words]
    assert uniforms(12, seed=seed, count=count, stream=stream).tolist() == expected
    assert derived_seed(seed=seed, count=count, stream=stream) == words[0] >> 1


def test_recorded_values():
    """The draws of every version on every platform."""
    assert uniforms(3, seed=0, count=0).tolist() == [
        0.08237630034858878,
        0.8843802930416267,
        0.4485357196923956,
    ]


def test_a_shorter_draw_is_the_beginning_of_a_longer_one():
    long = uniforms(100, seed=1, count=2)
    for n in (0, 1, 4, 5, 99):
        assert np.array_equal(uniforms(n, seed=1, count=2), long[:n])


@pytest.mark.parametrize("name", ["seed", "count", "stream"])
def test_arguments_must_be_64_bit_integers(name):
    for draw in (lambda **a: uniforms(1, **a), derived_seed):
        arguments = {"seed": 0, "count": 0, "stream": 0}
        draw(**{**arguments, name: np.int64(2**63 - 1)})
        draw(**{**arguments, name: 2**64 - 1})
        for wrong in (-1, 2**64):
            message = rf"`{name}` must be in \[0, 18446744073709551615\]. Received: {name}={wrong}"
            with pytest.raises(ESAMValueError, match=message):
                draw(**{**arguments, name: wrong})
        with pytest.raises(ESAMTypeError, match=f"`{name}` must be an integer"):
            draw(**{**arguments, name: 1.5})


def test_a_number_of_draws_below_0_is_refused():
    with pytest.raises(ESAMValueError, match=r"`n` must be >= 0\. Received: n=-1\."):
        uniforms(-1, seed=0, count=0)


def test_seeds_counts_and_streams_all_matter():
    draws = {
        tuple(uniforms(4, seed=seed, count=count, stream=stream))
        for seed in range(3)
        for count in range(3)
        for stream in (0, 1, SELECTION_STREAM)
    }
    assert len(draws) == 27


def test_range_and_distribution():
    drawn = uniforms(200_000, seed=4, count=0)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert abs(drawn.mean() - 0.5) < 5 * np.sqrt(1 / 12 / drawn.size)
    counts = np.bincount((drawn * 16).astype(int), minlength=16)
    expected = drawn.size / 16
    chi_square = float(np.sum((counts - expected) ** 2 / expected))
    assert chi_square < 45  # 15 degrees of freedom: passed with probability 1 - 8e-5


def test_no_global_generator_is_touched():
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    uniforms(10, seed=0, count=0)
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    assert np.array_equal(before["state"]["key"], after["state"]["key"])
    assert before["state"]["pos"] == after["state"]["pos"]
