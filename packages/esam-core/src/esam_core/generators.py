"""Random generators of the host: those of NumPy and Python, global ones and the user's own."""

import pickle
import random
from typing import Any

import numpy as np

__all__ = ["GLOBAL", "HostRandomState", "is_generator", "set_state", "state_of"]

_KINDS = (np.random.Generator, np.random.RandomState, random.Random)

#: NumPy's and Python's modules are their global generators.
GLOBAL: tuple[Any, ...] = (np.random, random)


class HostRandomState:
    """The states of NumPy's and Python's global generators, which some forwards draw from.

    Example:
        >>> before = HostRandomState()
        >>> first = random.random()
        >>> before.has_moved()
        True
        >>> before.restore()
        >>> random.random() == first
        True
    """

    def __init__(self) -> None:
        self._states: list[Any] = [state_of(generator) for generator in GLOBAL]

    def has_moved(self) -> bool:
        """Return whether the state of a generator has changed."""
        return HostRandomState()._states != self._states

    def restore(self) -> None:
        """Restore the state of both generators."""
        for generator, state in zip(GLOBAL, self._states, strict=True):
            set_state(generator, state)


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator of NumPy or Python."""
    return isinstance(value, _KINDS)


def state_of(value: Any) -> bytes | None:
    """Return the state of a random generator; None if the value is none, or has no state.

    Equal states are equal bytes. The modules `numpy.random` and `random` stand for their global
    generators.

    Example:
        >>> generator = random.Random(0)
        >>> state = state_of(generator)
        >>> first = generator.random()
        >>> set_state(generator, state)
        >>> generator.random() == first, state_of(random.SystemRandom()), state_of(3)
        (True, None, None)
    """
    if not (isinstance(value, _KINDS) or value is random or value is np.random):
        return None
    if isinstance(value, np.random.Generator):
        return pickle.dumps(value.bit_generator.state)
    if value is np.random or isinstance(value, np.random.RandomState):
        return pickle.dumps(value.get_state(legacy=False))
    if isinstance(value, random.SystemRandom):
        return None
    return pickle.dumps(value.getstate())


def set_state(generator: Any, state: bytes) -> None:
    """Set the state of a random generator.

    Args:
        generator: the generator.
        state: what `state_of` has returned for it.
    """
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    elif generator is np.random or isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    else:
        generator.setstate(pickle.loads(state))
