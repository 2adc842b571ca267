"""Random generators of the user's own: torch's, NumPy's and Python's."""

import pickle
import random
from typing import Any

import numpy as np
import torch

__all__ = ["is_generator", "set_state", "state_of"]


_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator."""
    return isinstance(value, _KINDS)


def state_of(value: Any) -> bytes | None:
    """Return the state of a random generator; None if the value is none, or has no state.

    Example:
        >>> generator = random.Random(0)
        >>> state = state_of(generator)
        >>> first = generator.random()
        >>> set_state(generator, state)
        >>> generator.random() == first, state_of(random.SystemRandom()), state_of(3)
        (True, None, None)
    """
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return pickle.dumps(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return pickle.dumps(value.get_state(legacy=False))
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return pickle.dumps(value.getstate())
    return None


def set_state(generator: Any, state: bytes) -> None:
    """Restore the state of a random generator.

    Args:
        generator: the generator.
        state: what `state_of` has returned for it.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    else:
        generator.setstate(pickle.loads(state))
