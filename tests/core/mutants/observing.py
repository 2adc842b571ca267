"""Wrong results of sessions."""

from typing import Any

from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.conformance.numpy_adapter import NumpySession

__all__ = ["MUTANTS"]

MUTANTS = Mutants()


@MUTANTS.caught_by("check_results_are_copies")
class WeightsAreViews(NumpySession):
    """`weights` returns the arrays that later steps change."""

    def weights(self) -> dict[str, NDArray[Any]]:
        """Return the parameters themselves."""
        return dict(self.network.parameters)


@MUTANTS.caught_by("check_results_are_copies")
class GradientsAreViews(NumpySession):
    """`gradients` returns the arrays to which later steps add."""

    def gradients(self) -> dict[str, NDArray[Any]]:
        """Return the gradients themselves."""
        return self.left

    def zero_gradients(self) -> None:
        """Set them to 0 in place."""
        for g in self.left.values():
            g[...] = 0.0
        self.pending = False
