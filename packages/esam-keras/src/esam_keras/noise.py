"""Random numbers that layers draw outside of Keras's seed generators.

Every pass of a step must draw the same ones. Generators of the host, which are Python's and NumPy's
global ones and those that layers hold, are set back before each pass. Each
backend handles its framework's own generators.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from esam_core import generators as host
from esam_keras import compat
from esam_keras.units import torch_modules
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
        self.generators: list[Any] | None = None
        self.operation: str | None = None
        self._warned = False

    def begin(self, model: keras.Model) -> "StepNoise":
        """Return the generators in a step that begins now."""
        found = self.generators
        return StepNoise(self, _generators(model) if found is None else found)

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

    def __init__(self, noise: Noise, generators: list[Any]) -> None:
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
        return [_state_of(generator) for generator in self._generators]

    def _write(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            _set_state(generator, state)


@contextmanager
def global_noise_kept() -> Iterator[None]:
    """Restore Python's and NumPy's global generators after the context."""
    before = host.HostRandomState()
    try:
        yield
    finally:
        before.restore()


def _generators(model: keras.Model) -> list[Any]:
    """Return the host's global generators, and those that are attributes of a model's layers."""
    layers = compat.flat_layers(model)
    own = (value for part in (*layers, *torch_modules(layers)) for value in _values(part))
    values = {id(value): value for value in (*host.GLOBAL, *own)}.values()
    return [value for value in values if _state_of(value) is not None]


def _values(part: Any) -> Iterator[Any]:
    """Yield a layer's attributes, and what its lists and dictionaries contain."""
    for value in compat.attributes(part).values():
        yield value
        if isinstance(value, dict | list | tuple):
            held: Iterable[Any] = value.values() if isinstance(value, dict) else value
            yield from held


def _is_of_torch(value: Any) -> bool:
    """Return whether a value is a random generator of torch."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Generator)


def _state_of(value: Any) -> bytes | None:
    """Return the state of a random generator; None if the value is none, or has no state."""
    if _is_of_torch(value):
        return bytes(value.get_state().numpy())
    return host.state_of(value)


def _set_state(generator: Any, state: bytes) -> None:
    """Set the state of a random generator."""
    if _is_of_torch(generator):
        torch: Any = sys.modules["torch"]
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    else:
        host.set_state(generator, state)
