"""Wrong restoring, updates, handling of non-finite values, and checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.config import ESAMConfig
from esam_core.conformance.numpy_adapter import NumpyAdapter, NumpySession
from esam_core.perturbation import squared_norms
from esam_core.reference.network import Evaluation
from esam_core.reference.step import Step
from esam_core.report import StepReport
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


@MUTANTS.caught_by("check_weights_come_back_bit_for_bit")
class NotRestored(Step):
    """The update runs at theta + epsilon."""

    def restore(self, theta: Sequence[Array]) -> None:
        """Do nothing."""


class _Subtracting(Step):
    """Restores by subtraction."""

    epsilon: Sequence[Array] = ()

    def apply_perturbation(self, epsilon: Sequence[Array]) -> None:
        """Keep epsilon."""
        self.epsilon = epsilon
        super().apply_perturbation(epsilon)

    def restore(self, theta: Sequence[Array]) -> None:
        """Subtract it again."""
        with np.errstate(all="ignore"):
            for array, e in zip(self.theta, self.epsilon, strict=False):
                array -= e
        self.epsilon = ()


@MUTANTS.caught_by("check_weights_come_back_bit_for_bit")
class RestoredBySubtraction(_Subtracting):
    """(theta + epsilon) - epsilon equals theta only up to rounding."""


@MUTANTS.caught_by("check_overflow_at_the_peak")
class OverflowSticks(_Subtracting):
    """inf - inf: after one overflow the weights stay NaN."""


@MUTANTS.caught_by("check_a_failed_step_leaves_no_trace")
class NotRestoredOnError(Step):
    """A pass that raises leaves the weights perturbed."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Record whether the passes finished."""
        self.complete = False
        result = super().perturbed_step(batch, mask, entry)
        self.complete = True
        return result

    def restore(self, theta: Sequence[Array]) -> None:
        """Restore only then."""
        if getattr(self, "complete", True):
            super().restore(theta)


@MUTANTS.caught_by("check_a_failed_step_leaves_no_trace")
class NotRestoredOnInterrupt(Step):
    """Only errors are handled: after an interrupt the random state is not restored."""

    def backward(self, batch: Any) -> Any:
        """Change the random state if something other than an Exception is raised."""
        try:
            return super().backward(batch)
        except Exception:
            raise
        except BaseException:
            self.model.evaluate(batch, statistics="batch", update=True)
            raise


@MUTANTS.caught_by("check_a_failed_step_leaves_no_trace")
class StatisticsOfAFailedStepStay(Step):
    """The running statistics keep the batch of a step that raised."""

    def restore_buffers(self, buffers: Mapping[str, Array]) -> None:
        """Do nothing."""


@MUTANTS.caught_by("check_a_failed_step_leaves_no_trace")
class FailedStepsCount(Step):
    """The step count advances before the passes, and stays advanced if they raise."""

    def backward(self, batch: Any) -> Any:
        """Count first."""
        count = self.count
        try:
            return super().backward(batch)
        finally:
            self.count = count + 1


@MUTANTS.caught_by("check_nonfinite_values_propagate")
class UnselectedNaNIgnored(Step):
    """A NaN in a rejected sample does not reach the gradient."""

    def weights_or_nan(self, weights: Array, length: float, *seen: Array | None) -> Array:
        """Ignore non-finite values."""
        return weights


@MUTANTS.caught_by("check_nonfinite_values_propagate")
class NaNMadeZero(Step):
    """Gradients that are not finite are replaced by zero."""

    def backward(self, batch: Any) -> Any:
        """Replace non-finite values by zero."""
        gradient, report = super().backward(batch)
        return {name: np.nan_to_num(g) for name, g in gradient.items()}, report


@MUTANTS.caught_by("check_nonfinite_values_leave_theta_alone")
class NaNIntoTheWeights(Step):
    """A non-finite perturbation is added, and stays."""

    def restore(self, theta: Sequence[Array]) -> None:
        """Keep NaN in the weights if there was any."""
        super().restore(theta)
        if self.bad:
            for array in self.theta:
                array += np.nan

    def norm(self, g: Any, scale: Any) -> float:
        """Record whether the norm is finite."""
        length = super().norm(g, scale)
        self.bad = not np.isfinite(length)
        return length


class _NonfiniteMode(Step):
    """Treats one value of `on_nonfinite` wrongly."""

    mode = ""

    @property
    def applies(self) -> bool:
        """Return whether this mode is set."""
        return self.config.on_nonfinite == self.mode


@MUTANTS.caught_by("check_nonfinite_steps_are_skipped")
class SkipIgnored(_NonfiniteMode):
    """`on_nonfinite="skip"` still runs the step."""

    mode = "skip"

    def is_finite(self, gradient: Mapping[str, Array], report: StepReport) -> bool:
        """Say yes."""
        return self.applies or super().is_finite(gradient, report)


@MUTANTS.caught_by("check_nonfinite_steps_raise")
class RaiseIgnored(SkipIgnored):
    """`on_nonfinite="raise"` still runs the step."""

    mode = "raise"


@MUTANTS.caught_by("check_nonfinite_steps_are_skipped")
class SkippedStepIsAStepOfZero(_NonfiniteMode):
    """A skipped step passes zeros to the base optimizer, whose momentum then moves the weights."""

    mode = "skip"

    def nonfinite_result(self, report: StepReport) -> tuple[dict[str, Array], StepReport]:
        """Return zeros."""
        _, report = super().nonfinite_result(report)
        return {u.name: np.zeros(u.shape) for u in self.model.units}, report


@MUTANTS.caught_by("check_nonfinite_steps_are_skipped")
class StatisticsOfASkippedStepStay(StatisticsOfAFailedStepStay):
    """NaN stays in the running statistics after a skipped step."""


@MUTANTS.caught_by("check_base_optimizers")
class UpdateMadeTwice(NumpySession):
    """The base optimizer's update runs twice."""

    def apply(self) -> None:
        """Update once more."""
        super().apply()
        super().apply()


@MUTANTS.caught_by("check_base_optimizers")
class UpdateWithoutBaseOptimizer(NumpySession):
    """The gradient is subtracted, for every base optimizer."""

    def apply(self) -> None:
        """Run SGD's update."""
        for name, g in self.left.items():
            self.network.parameters[name] -= self.base.base.lr * g


@MUTANTS.caught_by("check_paper_settings")
class AscentGradientLeaks(Step):
    """The ascent gradient is kept and added to the descent gradient."""

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Keep the gradient."""
        self.leak = super().ascent_gradient(ascent, mask)
        return self.leak

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Add the ascent gradient."""
        gradient, losses = super().descent(batch, indices, weights)
        for unit, g in zip(self.model.units, self.leak, strict=True):
            if g is not None:
                gradient[unit.name] = gradient[unit.name] + g
        return gradient, losses


@MUTANTS.caught_by("check_paper_settings")
class HalfPrecisionInside(Step):
    """The gradient passes through float16 on its way."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Round it."""
        gradient, losses = super().descent(batch, indices, weights)
        half = {name: g.astype(np.float16).astype(g.dtype) for name, g in gradient.items()}
        return half, losses


@MUTANTS.caught_by("check_paper_settings")
class GradientsPileUp(NumpySession):
    """A step adds to the gradients of the previous step."""

    def step(self, batch: Any, fault: Any = None) -> Any:
        """Keep the old gradients."""
        observed = self.passes(batch, fault)
        self.apply()
        return observed


@MUTANTS.caught_by("check_backward_adds_the_descent_gradient")
class GradientsOverwritten(NumpySession):
    """`backward` replaces the gradients of the previous micro-batch."""

    def accumulate(self, gradient: Mapping[str, Array]) -> None:
        """Replace the gradients."""
        self.left = {name: g.copy() for name, g in gradient.items()}


@MUTANTS.caught_by("check_backward_adds_the_descent_gradient")
class LeftoverGradientsBendThePerturbation(NumpySession):
    """The gradients of earlier micro-batches enter the ascent gradient."""

    def passes(self, batch: Any, fault: Any) -> Any:
        """Show the step the existing gradients."""
        if isinstance(self.esam, _Bent):
            self.esam.left = self.left
        return super().passes(batch, fault)

    def __init__(self, network: Any, base: Any, step: Step | None) -> None:
        super().__init__(network, base, _Bent.of(step) if step else None)


class _Bent(Step):
    """A step whose ascent gradient is added to the existing gradients."""

    left: Mapping[str, Array] = {}

    @classmethod
    def of(cls, step: Step) -> Step:
        """Return the step with this class's fault."""
        bent = cls(step.model, step.config)
        bent.rho, bent.adaptive, bent.perturb = step.rho, step.adaptive, step.perturb
        return bent

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Add the existing gradients."""
        found = super().ascent_gradient(ascent, mask)
        return [
            g if g is None else g + self.left.get(unit.name, 0.0)
            for unit, g in zip(self.model.units, found, strict=True)
        ]


@MUTANTS.caught_by("check_step_refuses_pending_gradients")
class PendingGradientsThrownAway(NumpySession):
    """A step after a backward silently discards the pending gradients."""

    def step(self, batch: Any, fault: Any = None) -> Any:
        """Ignore pending gradients."""
        self.pending = False
        return super().step(batch, fault)


@MUTANTS.caught_by("check_resuming")
class CountNotSaved(NumpySession):
    """A resumed run draws its first masks again."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Restart the count."""
        super().load({**state, "count": 0})


@MUTANTS.caught_by("check_resuming")
class MomentsNotSaved(NumpySession):
    """A resumed run starts with a fresh base optimizer."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Forget the base optimizer's state."""
        super().load({**state, "base": {"moments": {}, "steps": {}}})


@MUTANTS.caught_by("check_bad_hyperparameters_are_refused")
class TyposSwallowed(NumpyAdapter):
    """Unknown keywords are ignored."""

    def session(self, problem: Any, base: Any, esam: Any, **others: Any) -> NumpySession:
        """Drop unknown keywords."""
        known = {*ESAMConfig.__dataclass_fields__, "beta", "gamma"}
        kept = esam if esam is None else {k: v for k, v in esam.items() if k in known}
        return super().session(problem, base, kept, **others)


@MUTANTS.caught_by("check_bad_hyperparameters_are_refused")
class RangesNotChecked(NumpyAdapter):
    """A negative radius is accepted."""

    def session(self, problem: Any, base: Any, esam: Any, **others: Any) -> NumpySession:
        """Make it positive."""
        if esam and isinstance(esam.get("rho"), float):
            esam = {**esam, "rho": abs(esam["rho"])}
        return super().session(problem, base, esam, **others)


@MUTANTS.caught_by("check_an_empty_batch_is_refused")
class EmptyBatchAccepted(NumpySession):
    """An empty batch is a step that does nothing."""

    def passes(self, batch: Any, fault: Any) -> Any:
        """Return at once."""
        if len(batch.targets) == 0:
            return None
        return super().passes(batch, fault)


@MUTANTS.caught_by("check_groups")
class OneNormTooFew(Step):
    """Parameters with `perturb=False` are in the norm."""

    def perturbation(self, g: Any, scale: Any) -> list[Array]:
        """Include the gradients of all units in the norm."""
        squares = sum(squared_norms(self.whole, self.theta, self.adaptive))
        ratio = self.norm(g, scale) / np.sqrt(squares) if not all(self.perturb) else 1.0
        return [e * ratio for e in super().perturbation(g, scale)]

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Keep all gradients."""
        everything = Mask((True,) * len(mask.perturbed), mask.probability)
        self.whole = super().ascent_gradient(ascent, everything)
        return super().ascent_gradient(ascent, mask)
