"""Random generators, which a loss may draw from: those of torch, NumPy and Python."""

from typing import Any

import torch

from esam_core import generators

__all__ = ["is_generator", "set_state", "state_of"]


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator."""
    return isinstance(value, torch.Generator) or generators.is_generator(value)


def state_of(value: Any) -> bytes | None:
    """Return the state of a random generator; None if the value is none, or has no state."""
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    return generators.state_of(value)


def set_state(generator: Any, state: bytes) -> None:
    """Set the state of a random generator.

    Args:
        generator: the generator.
        state: what `state_of` has returned for it.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    else:
        generators.set_state(generator, state)
