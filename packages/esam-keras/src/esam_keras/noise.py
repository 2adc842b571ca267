"""Random numbers that layers draw outside of Keras's seed generators.

Every pass of a step must draw the same ones. Generators of the host, which are Python's and NumPy's
global ones and those that layers hold, are set back before each pass. Those of a framework are the
matter of its backend.
"""

import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np

from esam_keras import compat
from esam_keras.units import torch_wrappers
from esam_keras.warning import warn_user

__all__ = ["Noise", "StepNoise", "global_noise_kept"]


class Noise:
    """What is known about the random numbers that the forwards of a model draw.

    Attributes:
        generators: the host's generators that forwards draw from; None until a step with several
            passes has shown it. Only these are set back: threads that prepare data may draw from
            the others meanwhile.
        operation: the description of an operation that draws anew in each pass; None if none does.
    """

    def __init__(self) -> None:
        self.generators: list[_Generator] | None = None
        self.operation: str | None = None
        self._warned = False

    def begin(self, model: keras.Model) -> "StepNoise":
        """Return the generators in a step that begins now."""
        found = self.generators
        return StepNoise(self, list(_generators(model)) if found is None else found)

    def warn(self) -> None:
        """Warn once if an operation draws anew in each pass."""
        if self.operation is not None and not self._warned:
            self._warned = True
            warn_user(
                "Random numbers must be drawn by `keras.random` with a `SeedGenerator` that the "
                "layer holds, so that all passes of a step use the same: otherwise sharpness, and "
                "the selection by it, measure the noise. Received: TensorFlow's own generator, in "
                f"{self.operation}, which draws other numbers in each pass."
            )


class StepNoise:
    """The host's generators in one step.

    Args:
        noise: what is known; this step adds to it.
        generators: those that each pass draws from as at the start of the step.
    """

    def __init__(self, noise: Noise, generators: "list[_Generator]") -> None:
        self._noise = noise
        self._generators = generators
        self._entry = self._read()
        self._after: list[Any] | None = None
        self._passes = 0
        self._moved = [True] * len(generators)  # in each pass so far

    @contextmanager
    def one_pass(self, *, records: bool, again: bool) -> Iterator[None]:
        """Run a pass from the states at the start of the step.

        Args:
            records: whether `keep` sets the states after this pass.
            again: whether parts of a pass run again; they need not draw.
        """
        outer = self._read()
        self._write(self._entry)
        try:
            yield
            now = self._read()
            if records:
                self._after = now
            if not again:
                self._passes += 1
                changes = zip(self._moved, now, self._entry, strict=True)
                self._moved = [moved and new != old for moved, new, old in changes]
        finally:
            self._write(outer)

    def keep(self) -> None:
        """Set the generators to their states after the pass that records."""
        if self._after is not None:
            self._write(self._after)
        if self._passes > 1:
            pairs = zip(self._generators, self._moved, strict=True)
            self._noise.generators = [generator for generator, moved in pairs if moved]

    def restore(self) -> None:
        """Set the generators to their states at the start of the step."""
        self._write(self._entry)

    def _read(self) -> list[Any]:
        return [generator.read() for generator in self._generators]

    def _write(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.write(state)


@contextmanager
def global_noise_kept() -> Iterator[None]:
    """Restore Python's and NumPy's global generators after the context."""
    before = [generator.read() for generator in _GLOBAL]
    try:
        yield
    finally:
        for generator, state in zip(_GLOBAL, before, strict=True):
            generator.write(state)


class _Generator(NamedTuple):
    """A random generator: functions that return its state, which can be compared, and set it."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


def _pickled(read: Callable[[], Any], write: Callable[[Any], None]) -> _Generator:
    """Return a generator whose state contains arrays."""
    return _Generator(lambda: pickle.dumps(read()), lambda state: write(pickle.loads(state)))


_GLOBAL = (
    _Generator(random.getstate, random.setstate),
    _pickled(np.random.get_state, np.random.set_state),
)


def _generators(model: keras.Model) -> Iterator[_Generator]:
    """Yield the host's global generators, and those that are attributes of a model's layers."""
    yield from _GLOBAL
    layers = compat.flat_layers(model)
    parts = [part for layer in torch_wrappers(layers) for part in layer.module.modules()]
    held = {id(value): value for part in (*layers, *parts) for value in _values(part)}
    yield from filter(None, map(_generator_of, held.values()))


def _values(part: Any) -> Iterator[Any]:
    """Yield a layer's attributes, and what its lists and dictionaries contain."""
    for value in compat.attributes(part).values():
        yield value
        if isinstance(value, dict | list | tuple):
            held: Iterable[Any] = value.values() if isinstance(value, dict) else value
            yield from held


def _generator_of(value: Any) -> _Generator | None:
    """Return a value as a generator; None if it is none, or has no state."""
    torch: Any = sys.modules.get("torch")
    if isinstance(value, random.SystemRandom):
        return None
    if isinstance(value, random.Random):
        return _Generator(value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        return _pickled(value.get_state, value.set_state)
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        return _pickled(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if torch is not None and isinstance(value, torch.Generator):
        return _pickled(
            lambda: value.get_state().numpy(),
            lambda state: value.set_state(torch.from_numpy(state)),
        )
    return None
