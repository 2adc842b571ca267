"""How a wrong step is written down: a class, what is wrong with it, and which check must see it."""

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
    """A backend that is wrong in one respect.

    Args:
        name: of the class that is wrong.
        fault: what is wrong, in words.
        caught_by: the check that must fail.
        adapter: makes the wrong backend.
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
    """Return what makes a reference backend with one class exchanged."""
    if issubclass(cls, Step):
        return lambda: NumpyAdapter(step=cls)
    if issubclass(cls, NumpySession):
        return lambda: NumpyAdapter(session=cls)
    if issubclass(cls, WatchedNetwork):
        return lambda: NumpyAdapter(network=cls)
    return cast(Callable[[], Adapter], cls)
