"""The decorator for checks, with the capabilities that they need."""

from collections.abc import Callable
from typing import Any

from esam_core.conformance.adapter import CAPABILITIES, Adapter

__all__ = ["Check", "check", "missing", "needs_of"]

#: A check takes an adapter, returns nothing, and raises ConformanceError.
Check = Callable[[Adapter], None]


def check(*needs: str) -> Callable[[Check], Check]:
    """Mark a function as a check that cannot run without these capabilities."""
    unknown = set(needs) - set(CAPABILITIES)
    if unknown:
        raise ValueError(f"`needs` must be capabilities. Received: {sorted(unknown)}.")

    def mark(function: Check) -> Check:
        marked: Any = function
        marked.needs = needs
        return function

    return mark


def needs_of(function: Check) -> tuple[str, ...]:
    """Return the capabilities that a check cannot run without."""
    return tuple(getattr(function, "needs", ()))


def missing(function: Check, adapter: Adapter) -> tuple[str, ...]:
    """Return those of them that the backend declares as gaps."""
    return tuple(need for need in needs_of(function) if need in adapter.gaps)
