"""Wrong handling of values that are not finite."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.conformance.numpy_adapter import NumpySession
from esam_core.errors import NonFiniteError
from esam_core.problem import Batch
from esam_core.reference.step import Step
from esam_core.report import StepReport
from esam_core.selectors import Selection

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


@MUTANTS.caught_by("check_a_nan_is_the_largest_score")
class NaNIsTheSmallestScore(Step):
    """A sample whose score is NaN is selected last, as NumPy sorts it."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Sort NaN to the end."""
        right = super().selection(losses, perturbed_losses)
        if self.config.select.rule != "top":
            return right
        scores = losses if perturbed_losses is None else perturbed_losses - losses
        order = np.argsort(-scores, kind="stable")
        return replace(right, indices=np.sort(order[: len(right.indices)]))


@MUTANTS.caught_by("check_overflows_propagate")
class OverflowOfTheNormHidden(Step):
    """If the norm of the ascent gradient overflows, the descent gradient is still finite."""

    def weights_or_nan(self, weights: Array, length: float, *seen: Array | None) -> Array:
        """Look at the losses alone."""
        del length
        return super().weights_or_nan(weights, 0.0, *seen)


@MUTANTS.caught_by("check_overflows_propagate")
class OverflowAtThePeakHidden(Step):
    """If a perturbed loss overflows whose sample is not selected, the gradient is finite."""

    def weights_or_nan(self, weights: Array, length: float, *seen: Array | None) -> Array:
        """Look at the losses at theta alone."""
        return super().weights_or_nan(weights, length, *seen[:1])


@MUTANTS.caught_by("check_a_skipped_backward_keeps_the_gradients")
class SkipDropsTheGradients(NumpySession):
    """A skipped backward resets the gradients of earlier ones."""

    def accumulate(self, gradient: Any) -> None:
        """Reset them if there is no gradient."""
        if not gradient:
            self.left = {}
        super().accumulate(gradient)


@MUTANTS.caught_by("check_nonfinite_steps_raise")
class RaisingAdvancesTheGenerator(Step):
    """The random state is not restored when a step raises for a value that is not finite."""

    def backward(self, batch: Batch) -> Any:
        """Leave the random state of the passes."""
        try:
            return super().backward(batch)
        except NonFiniteError:
            self.model.forward_state = self.after
            raise

    def nonfinite_result(self, report: StepReport) -> Any:
        """Remember the random state."""
        self.after = self.model.forward_state
        return super().nonfinite_result(report)


@MUTANTS.caught_by("check_nonfinite_steps_are_skipped")
class BaseStepsNeverSkipped(Step):
    """`on_nonfinite` has no effect in base steps."""

    def is_finite(self, gradient: Any, report: StepReport) -> bool:
        """Look at steps that perturb alone."""
        return not report.perturbed or super().is_finite(gradient, report)


@MUTANTS.caught_by("check_nonfinite_steps_raise")
class BaseStepsNeverRaise(BaseStepsNeverSkipped):
    """`on_nonfinite="raise"` has no effect in base steps."""


@MUTANTS.caught_by("check_nonfinite_values_propagate")
class NoNormPerturbsNaN(Step):
    """With `norm="none"`, a non-finite gradient perturbs."""

    def perturbation(self, g: Any, scale: Any) -> list[Array]:
        """Multiply without a look at the gradient."""
        if self.config.norm != "none":
            return super().perturbation(g, scale)
        rows = zip(g, scale, self.rho, self.theta, strict=True)
        return [np.zeros_like(t) if a is None else s * r * a for a, s, r, t in rows]
