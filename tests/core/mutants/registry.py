"""The registry of mutants: a wrong class, its fault, and the check that must catch it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.numpy_adapter import NumpyAdapter, NumpySession, WatchedNetwork
from esam_core.reference.step import Step

__all__ = ["Mutant", "Mutants"]

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Mutant:
    """A backend with one fault.

    Args:
        name: the name of the wrong class.
        fault: a description of the fault.
        caught_by: the check that must fail.
        adapter: creates the wrong backend.
    """

    name: str
    fault: str
    caught_by: str
    adapter: Callable[[], Adapter]


class Mutants(list[Mutant]):
    """A list that grows by decorating classes with the name of the check that must fail."""

    def caught_by(self, check: str) -> Callable[[C], C]:
        """Return a decorator for a subclass of the step, session, network or adapter."""

        def add(cls: C) -> C:
            fault = (cls.__doc__ or "").strip()
            self.append(Mutant(cls.__name__, fault, check, _adapter_of(cls)))
            return cls

        return add


def _adapter_of(cls: type) -> Callable[[], Adapter]:
    """Return a function that creates a reference backend with one class replaced."""
    if issubclass(cls, Step):
        return lambda: NumpyAdapter(step=cls)
    if issubclass(cls, NumpySession):
        return lambda: NumpyAdapter(session=cls)
    if issubclass(cls, WatchedNetwork):
        return lambda: NumpyAdapter(network=cls)
    return cast(Callable[[], Adapter], cls)
