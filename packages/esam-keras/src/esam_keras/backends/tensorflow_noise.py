"""Random operations of TensorFlow, whose numbers no pass of a step can draw again."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf

from esam_keras import compat
from esam_keras.noise import Noise

__all__ = ["DrawsOfStep"]

#: The types of operations that change the state of a generator; not the stateless ones, and not
#: those with which a backward begins.
_DRAWS = re.compile(
    r"(?!Stateless)\w*Random(?!\w*(Grad|Dataset))\w*|(Parameterized|Stateful)?TruncatedNormal\w*|"
    r"Stateful(Uniform|StandardNormal)\w*|Multinomial|NonDeterministicInts|Rng(ReadAnd)?Skip|"
    r"\w+CandidateSampler|SampleDistortedBoundingBox\w*|Fractional(Avg|Max)Pool"
)


class DrawsOfStep:
    """Finds the random operations in the passes of a step, while it is traced or uncompiled.

    Args:
        noise: what is known; gets the first such operation, if several passes have some.
    """

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._passes = 0  # with such operations

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Watch a pass, if it is traced, or uncompiled steps have not shown yet what they draw."""
        known = self._noise.operation is not None
        if known or not (tf.inside_function() or self._noise.generators is None):
            yield
            return
        found: list[str] = []

        def look(kind: str, name: str | None) -> None:
            if _DRAWS.fullmatch(kind):
                found.append(kind if name is None else f"{kind} ({name})")

        with compat.operations_seen(look):
            yield
        self._passes += bool(found)
        if self._passes > 1 and found:
            self._noise.operation = found[0]
