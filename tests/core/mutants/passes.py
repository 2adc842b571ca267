"""Wrong statistics, wrong noise, gradients at the wrong weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.conformance.numpy_adapter import WatchedNetwork
from esam_core.reference.network import Evaluation
from esam_core.reference.step import Step, mean_weights, subset
from esam_core.report import StepReport
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


@MUTANTS.caught_by("check_running_statistics_are_updated_once")
class StatisticsUpdatedTwice(Step):
    """The selection or descent pass updates the running statistics as well."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Update again."""
        self.model.evaluate(subset(batch, indices), statistics="batch", update=True)
        return super().descent(batch, indices, weights)


@MUTANTS.caught_by("check_running_statistics_are_updated_once")
class StatisticsUpdatedInEveryPass(WatchedNetwork):
    """Every pass in training mode updates the running statistics: three times per step."""

    def evaluate(
        self, batch: Any, *, statistics: str = "batch", update: bool = False
    ) -> Evaluation:
        """Update whenever batch statistics are used."""
        always = statistics == "batch"
        return super().evaluate(batch, statistics=statistics, update=update or always)


@MUTANTS.caught_by("check_running_statistics_are_updated_once")
class StatisticsUpdatedAtThePeak(Step):
    """The running statistics are those at theta + epsilon."""

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Do not update here."""
        return self.model.evaluate(batch, statistics="batch", update=False)

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Update there."""
        state = self.model.forward_state
        self.model.evaluate(batch, statistics="batch", update=True)
        self.model.forward_state = state
        return super().descent(batch, indices, weights)


@MUTANTS.caught_by("check_running_statistics_are_updated_once")
class StatisticsNeverUpdated(Step):
    """No pass updates the running statistics: momentum 0 in all of them."""

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Do not update."""
        return self.model.evaluate(batch, statistics="batch", update=False)


@MUTANTS.caught_by("check_batch_statistics_are_those_of_each_pass")
class DescentByRunningStatistics(Step):
    """The descent pass normalises by the running statistics, for any number of samples."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Evaluate as in inference."""
        samples = subset(batch, indices)
        evaluation = self.model.evaluate(samples, statistics="running", update=False)
        return evaluation.gradient(weights), evaluation.losses


@MUTANTS.caught_by("check_batch_statistics_are_those_of_each_pass")
class SelectionByRunningStatistics(Step):
    """The selection pass runs in inference mode."""

    def selection_pass(self, batch: Any) -> Array:
        """Evaluate as in inference."""
        return self.model.evaluate(batch, statistics="running", update=False).losses


@MUTANTS.caught_by("check_one_selected_sample_with_batchnorm")
class OneSampleByItself(Step):
    """One selected sample is normalised by its own statistics: to zero."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Normalise by the batch of one."""
        samples = subset(batch, indices)
        evaluation = self.model.evaluate(samples, statistics="batch", update=False)
        return evaluation.gradient(weights), evaluation.losses


@MUTANTS.caught_by("check_a_batch_of_one_sample_with_batchnorm")
class BatchOfOneByRunningStatistics(Step):
    """The only sample of a batch is normalised by the running statistics."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Look at the number of selected samples only."""
        if len(indices) > 1:
            return super().descent(batch, indices, weights)
        samples, update = subset(batch, indices), not self.records_at_theta(len(batch.targets))
        evaluation = self.model.evaluate(samples, statistics="running", update=update)
        return evaluation.gradient(weights), evaluation.losses


@MUTANTS.caught_by("check_selection_pass_sees_the_same_noise")
class SelectionWithOtherNoise(Step):
    """The selection pass draws its own dropout noise."""

    def selection_pass(self, batch: Any) -> Array:
        """Continue drawing after the ascent pass."""
        self.model.forward_state = self.after_ascent
        return super().selection_pass(batch)

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Remember the generator's state."""
        evaluation = super().ascent(batch, part)
        self.after_ascent = self.model.forward_state
        return evaluation


@MUTANTS.caught_by("check_descent_pass_sees_the_same_noise")
class DescentWithOtherNoise(SelectionWithOtherNoise):
    """The descent pass draws its own dropout noise."""

    def selection_pass(self, batch: Any) -> Array:
        """Make this pass right."""
        return Step.selection_pass(self, batch)

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Continue drawing after the ascent pass."""
        self.model.forward_state = self.after_ascent
        return super().descent(batch, indices, weights)


@MUTANTS.caught_by("check_descent_on_some_samples_sees_the_same_noise")
class PartialDescentWithOtherNoise(DescentWithOtherNoise):
    """The descent pass draws its own dropout noise if not all samples are selected."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Make the pass on all samples right."""
        if len(indices) == len(batch.targets):
            return Step.descent(self, batch, indices, weights)
        return super().descent(batch, indices, weights)


@MUTANTS.caught_by("check_random_state_after_a_step")
class GeneratorLeftWhereTheDescentEnds(Step):
    """On return the generator has moved by the descent pass's draws, fewer than a forward's."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Leave the generator as it is."""
        self.left: Any = None
        result = super().perturbed_step(batch, mask, entry)
        self.model.forward_state = self.left
        self.model.evaluate(batch, statistics="batch", update=False)
        return result

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Remember the state after this pass."""
        gradient = super().descent(batch, indices, weights)
        self.left = self.model.forward_state
        return gradient


@MUTANTS.caught_by("check_selection_pass_sees_the_same_noise")
class NoiseNeverChanges(Step):
    """The generator is restored to its state at entry: every step has the same noise."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Restore the generator."""
        result = super().perturbed_step(batch, mask, entry)
        self.model.forward_state = entry
        return result


@MUTANTS.caught_by("check_everything_is_sam")
class PlainSGD(Step):
    """The base optimizer's gradient is returned as ESAM's."""

    def mask(self) -> Mask:
        """Perturb nothing."""
        mask = super().mask()
        return mask.within([False] * len(mask.perturbed))


@MUTANTS.caught_by("check_everything_is_sam")
class DescentAtTheta(Step):
    """The descent gradient is computed after the weights are restored."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Restore the weights first."""
        self.restore(self.start)
        return super().descent(batch, indices, weights)

    def apply_perturbation(self, epsilon: Sequence[Array]) -> None:
        """Remember theta."""
        self.start = [theta.copy() for theta in self.theta]
        super().apply_perturbation(epsilon)


@MUTANTS.caught_by("check_losses_before_and_after")
class Downhill(Step):
    """The perturbation is subtracted."""

    def apply_perturbation(self, epsilon: Sequence[Array]) -> None:
        """Subtract epsilon."""
        super().apply_perturbation([-e for e in epsilon])


@MUTANTS.caught_by("check_losses_before_and_after")
class PerturbedLossesReportedAsLosses(Step):
    """The losses reported are those at theta + epsilon."""

    def perturbed_step(self, batch: Any, mask: Mask, entry: Any) -> Any:
        """Report the wrong ones."""
        gradient, report = super().perturbed_step(batch, mask, entry)
        if report.perturbed_losses is None:
            return gradient, report
        wrong = {**vars(report), "losses": report.perturbed_losses}
        return gradient, StepReport(**wrong)


@MUTANTS.caught_by("check_rho_zero_is_the_base_optimizer")
class ZeroRadiusStillSelects(Step):
    """With rho = 0 the passes still run, and samples are rejected."""

    def mask(self) -> Mask:
        """Draw a mask where there is nothing to perturb."""
        return self.config.perturb.draw(self.model.units, seed=self.config.seed, count=self.count)


@MUTANTS.caught_by("check_empty_mask_is_a_base_step")
class EmptyMaskStillSelects(Step):
    """A step that perturbs nothing still drops half of the batch."""

    def base_step(self, batch: Any) -> tuple[dict[str, Array], StepReport]:
        """Select the samples with the largest loss."""
        evaluation = self.model.evaluate(batch, statistics="batch", update=True)
        half = np.sort(np.argsort(-evaluation.losses)[: max(1, len(batch.targets) // 2)])
        gradient = self.model.evaluate(
            subset(batch, half), statistics="batch", update=False
        ).gradient(mean_weights(len(half)))
        return gradient, StepReport(count=self.count, losses=evaluation.losses)


@MUTANTS.caught_by("check_empty_mask_is_a_base_step")
class EmptyMaskMakesNoStep(Step):
    """A step that perturbs nothing is skipped."""

    def base_step(self, batch: Any) -> tuple[dict[str, Array], StepReport]:
        """Return no gradient."""
        gradient, report = super().base_step(batch)
        return {name: 0.0 * g for name, g in gradient.items()}, report


@MUTANTS.caught_by("check_the_batch_is_left_alone")
class BatchCentred(Step):
    """The inputs are centred in place."""

    def backward(self, batch: Any) -> Any:
        """Write to the batch."""
        batch.inputs[...] -= batch.inputs.mean()
        return super().backward(batch)
