"""Random numbers that depend only on (seed, count, stream).

Philox is a counter-based generator: its n-th word is a fixed function of a key and a counter. A
draw therefore needs no state, is the same on every platform and rank, and can be repeated after a
resume. We use the raw words: NumPy guarantees that they are stable across versions, but does not
for `Generator` methods.
"""

import numpy as np
from numpy.typing import NDArray

from esam_core import validation

__all__ = ["OFFSET_STREAM", "SELECTION_STREAM", "derived_seed", "uniforms"]

#: Samplers use the streams 0, 1, 2, ... (one per nesting level); the selection has its own, which
#: `Random` and `Part` share.
SELECTION_STREAM = 1 << 32

#: The stream of `Proportional`. With the stream above, its samples would depend on those of `Part`.
OFFSET_STREAM = SELECTION_STREAM + 1

# The second key word keeps our draws independent of another library's use of the same seed.
_TAG = 0x4553414D  # "ESAM"


def _words(n: int, seed: int, count: int, stream: int) -> NDArray[np.uint64]:
    """Return n raw 64-bit Philox words; different counts and streams never overlap."""
    for name, value in (("seed", seed), ("count", count), ("stream", stream)):
        validation.count_number(name, value, most=2**64 - 1)
    generator = np.random.Philox(
        key=np.array([seed, _TAG], dtype=np.uint64),
        counter=np.array([0, 0, count, stream], dtype=np.uint64),
    )
    return np.asarray(generator.random_raw(n), dtype=np.uint64)


def uniforms(n: int, *, seed: int, count: int, stream: int = 0) -> NDArray[np.float64]:
    """Return n numbers drawn uniformly from [0, 1), on the grid of multiples of 2**-53.

    Args:
        n: how many numbers, >= 0.
        seed: in [0, 2**64).
        count: the step count, in [0, 2**64).
        stream: selects one of the independent sequences of this (seed, count), in [0, 2**64).

    Raises:
        ESAMValueError, ESAMTypeError: an argument is not an integer in its range.

    Example:
        >>> from esam_core.draws import uniforms
        >>> bool((uniforms(3, seed=0, count=7) == uniforms(3, seed=0, count=7)).all())
        True
    """
    words = _words(validation.count_number("n", n), seed, count, stream)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derived_seed(*, seed: int, count: int, stream: int = 0) -> int:
    """Return a seed in [0, 2**63) for a framework's own generator."""
    return int(_words(1, seed, count, stream)[0] >> np.uint64(1))
