"""Wrong choices of samples, and wrong weights for them."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core import selectors
from esam_core.reference.step import Step, mean_weights
from esam_core.selectors import Selection

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


class _OtherK(Step):
    """A number of samples other than ceil(gamma b)."""

    def k(self, b: int) -> int:
        """Return the wrong k."""
        raise NotImplementedError

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Select the wrong number of samples."""
        right = super().selection(losses, perturbed_losses)
        if perturbed_losses is None or self.config.select.rule != "top":
            return right
        k = self.k(len(losses))
        indices = selectors.top_indices(perturbed_losses - losses, k)
        return Selection(indices, np.full(k, 1.0 / max(k, 1)), right.threshold)


@MUTANTS.caught_by("check_number_of_selected_samples")
class KRoundedDown(_OtherK):
    """k = int(gamma b): 28 of 100 at gamma = .29."""

    def k(self, b: int) -> int:
        """Round down."""
        return max(1, int(b * self.config.select.gamma))


@MUTANTS.caught_by("check_number_of_selected_samples")
class KRounded(_OtherK):
    """k = round(gamma b): 2 of 8 at gamma = .3."""

    def k(self, b: int) -> int:
        """Round to the nearest integer."""
        return max(1, round(b * self.config.select.gamma))


@MUTANTS.caught_by("check_number_of_samples_of_each_selector")
class RandomKByFloatCeiling(Step):
    """`Random` selects the ceiling of a float product: 8 of 100 at gamma = .07."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Draw the wrong number."""
        right, select = super().selection(losses, perturbed_losses), self.config.select
        if select.rule != "random":
            return right
        b = len(losses)
        k = math.ceil(b * select.gamma)
        drawn = selectors.random_indices(b, k, seed=self.config.seed, count=self.count)
        return Selection(drawn, mean_weights(k), right.threshold)


@MUTANTS.caught_by("check_number_of_samples_of_each_selector")
class TopLossKRoundedDown(Step):
    """`TopLoss` selects int(gamma b) samples: 2 of 8 at gamma = .3."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Leave out the last one."""
        right, select = super().selection(losses, perturbed_losses), self.config.select
        if select.rule != "top" or select.score != "loss":
            return right
        k = max(1, int(len(losses) * select.gamma))
        return Selection(selectors.top_indices(losses, k), mean_weights(k), right.threshold)


@MUTANTS.caught_by("check_number_of_selected_samples")
class KByFloatCeiling(_OtherK):
    """k = ceil of a float product: 8 of 100 at gamma = .07."""

    def k(self, b: int) -> int:
        """Round up the float product."""
        return max(1, math.ceil(b * self.config.select.gamma))


@MUTANTS.caught_by("check_number_of_selected_samples")
class StrictThreshold(_OtherK):
    """Only samples *above* the threshold are selected: one too few, as in the authors' code."""

    def k(self, b: int) -> int:
        """Drop the sample at the threshold."""
        return max(1, selectors.subset_size(self.config.select.gamma, b) - 1)


@MUTANTS.caught_by("check_batches_of_one_and_two")
class SmallBatchesSelectNothing(_OtherK):
    """Of two samples none is selected."""

    def k(self, b: int) -> int:
        """Return 0 for small batches."""
        return 0 if b <= 2 else selectors.subset_size(self.config.select.gamma, b)


@MUTANTS.caught_by("check_number_of_selected_samples")
class NearlyAllMeansAll(_OtherK):
    """gamma >= .99 selects everything."""

    def k(self, b: int) -> int:
        """Keep all."""
        gamma = self.config.select.gamma
        return b if gamma >= 0.99 else selectors.subset_size(gamma, b)


class _OtherScores(Step):
    """Samples selected by a wrong score."""

    def scores(self, losses: Array, perturbed_losses: Array) -> Array:
        """Return the wrong scores."""
        raise NotImplementedError

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Select the samples with the largest wrong scores."""
        right = super().selection(losses, perturbed_losses)
        if perturbed_losses is None or self.config.select.rule != "top":
            return right
        indices = selectors.top_indices(self.scores(losses, perturbed_losses), len(right.indices))
        return Selection(indices, right.weights, right.threshold)


@MUTANTS.caught_by("check_largest_increases_are_selected")
class LeastSharpSelected(_OtherScores):
    """The least sharp samples are selected."""

    def scores(self, losses: Array, perturbed_losses: Array) -> Array:
        """Reverse the order."""
        return losses - perturbed_losses


@MUTANTS.caught_by("check_largest_increases_are_selected")
class SelectedByPerturbedLoss(_OtherScores):
    """The samples with the largest perturbed loss are selected."""

    def scores(self, losses: Array, perturbed_losses: Array) -> Array:
        """Do not subtract the unperturbed losses."""
        return perturbed_losses


@MUTANTS.caught_by("check_largest_increases_are_selected")
class SelectedByRelativeIncrease(_OtherScores):
    """The samples with the largest relative increase are selected."""

    def scores(self, losses: Array, perturbed_losses: Array) -> Array:
        """Divide instead of subtracting."""
        return np.asarray(perturbed_losses / losses)


@MUTANTS.caught_by("check_ties_go_to_the_lower_index")
class TiesToTheHigherIndex(_OtherScores):
    """Among equal samples the last ones are selected."""

    def scores(self, losses: Array, perturbed_losses: Array) -> Array:
        """Add a tiny multiple of the index."""
        return np.asarray(perturbed_losses - losses + 1e-12 * np.arange(len(losses)))


class _OtherOrder(Step):
    """Samples selected by the right scores, in the wrong way."""

    def top(self, scores: Array, k: int) -> Array:
        """Return k indices."""
        raise NotImplementedError

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Select by the score."""
        right = super().selection(losses, perturbed_losses)
        select = self.config.select
        if select.rule != "top" or len(right.indices) == len(losses):
            return right
        scores = losses if perturbed_losses is None else perturbed_losses - losses
        return Selection(self.top(scores, len(right.indices)), right.weights, right.threshold)


@MUTANTS.caught_by("check_larger_scores_precede_ties")
class FirstAboveTheThreshold(_OtherOrder):
    """The first k samples with at least the k-th largest score: ties may come before it."""

    def top(self, scores: Array, k: int) -> Array:
        """Keep the first of those that reach the threshold."""
        return np.flatnonzero(scores >= np.sort(scores)[-k])[:k]


@MUTANTS.caught_by("check_ties_go_to_the_lower_index")
class StableUpTo16(_OtherOrder):
    """Sorting is stable only for a few samples, as in libraries that insert these."""

    def top(self, scores: Array, k: int) -> Array:
        """Prefer the higher index among many samples."""
        if len(scores) <= 16:
            return selectors.top_indices(scores, k)
        return np.sort(np.argsort(scores, kind="stable")[-k:])


@MUTANTS.caught_by("check_selectors")
class SelectorIgnored(Step):
    """Every selector that needs no perturbed losses selects the first k samples."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Keep the first."""
        right = super().selection(losses, perturbed_losses)
        if perturbed_losses is not None or len(right.indices) == len(losses):
            return right
        return Selection(np.arange(len(right.indices)), right.weights, None)


@MUTANTS.caught_by("check_random_selection_is_that_of_the_step")
class RandomSelectionRepeats(Step):
    """`Random` selects the same positions in every step."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Draw for count 0."""
        right, self.count = self.count, 0
        try:
            return super().selection(losses, perturbed_losses)
        finally:
            self.count = right


class _OtherDescent(Step):
    """A descent pass with samples or weights that differ from the report."""

    def descent(self, batch: Any, indices: Array, weights: Array) -> Any:
        """Use the wrong samples or weights."""
        return super().descent(batch, *self.instead(len(batch.targets), indices, weights))

    def instead(self, b: int, indices: Array, weights: Array) -> tuple[Array, Array]:
        """Return the wrong samples and weights."""
        raise NotImplementedError


@MUTANTS.caught_by("check_descent_is_on_the_selected_samples")
class SelectionIgnored(_OtherDescent):
    """The descent gradient is the whole batch's."""

    def instead(self, b: int, indices: Array, weights: Array) -> tuple[Array, Array]:
        """Use all samples."""
        return np.arange(b), mean_weights(b)


@MUTANTS.caught_by("check_descent_is_on_the_selected_samples")
class RejectedSamplesUsed(_OtherDescent):
    """The descent gradient is that of the rejected samples."""

    def instead(self, b: int, indices: Array, weights: Array) -> tuple[Array, Array]:
        """Use the rejected samples."""
        others = np.setdiff1d(np.arange(b), indices)
        return (others, mean_weights(len(others))) if len(others) else (indices, weights)


@MUTANTS.caught_by("check_descent_is_on_the_selected_samples")
class DividedByTheWholeBatch(_OtherDescent):
    """The selected losses are divided by b instead of k."""

    def instead(self, b: int, indices: Array, weights: Array) -> tuple[Array, Array]:
        """Divide by b."""
        return indices, weights * len(indices) / b


@MUTANTS.caught_by("check_descent_is_on_the_selected_samples")
class SummedNotAveraged(_OtherDescent):
    """The selected losses are summed."""

    def instead(self, b: int, indices: Array, weights: Array) -> tuple[Array, Array]:
        """Weight each by 1."""
        return indices, weights * len(indices)


@MUTANTS.caught_by("check_sample_weights_enter_the_descent")
class SampleWeightsUnused(_OtherDescent):
    """The weights of `Proportional` are reported, but the plain mean is used."""

    def instead(self, b: int, indices: Array, weights: Array) -> tuple[Array, Array]:
        """Use the mean."""
        return indices, weights * 0.0 + 1.0 / len(indices)


@MUTANTS.caught_by("check_proportional_selection")
class SampleWeightsMissing(Step):
    """The samples of `Proportional` are all weighted 1/k."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Weight them evenly."""
        right = super().selection(losses, perturbed_losses)
        return Selection(right.indices, mean_weights(len(right.indices)), right.threshold)


@MUTANTS.caught_by("check_proportional_selection")
class ProportionalWithoutFloor(Step):
    """`Proportional` forgets the floor."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Draw by the bare score."""
        right = super().selection(losses, perturbed_losses)
        select = self.config.select
        if not isinstance(select, selectors.Proportional):
            return right
        increase = None if perturbed_losses is None else perturbed_losses - losses
        scores = losses if increase is None else increase
        pi = selectors.inclusion_probabilities(scores, len(right.indices), 1e-9)
        offset = selectors.systematic_offset(seed=self.config.seed, count=self.count)
        indices = selectors.systematic_indices(pi, offset)
        return Selection(indices, 1.0 / (len(losses) * pi[indices]), right.threshold)


@MUTANTS.caught_by("check_zero_gradient")
class ProportionalToZero(Step):
    """`Proportional` divides scores that are all 0 by their sum."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Weight the samples by NaN if there is nothing to be proportional to."""
        right = super().selection(losses, perturbed_losses)
        if self.config.select.rule != "proportional" or perturbed_losses is None:
            return right
        total = np.maximum(perturbed_losses - losses, 0.0).sum()
        return Selection(right.indices, right.weights * (total / total), right.threshold)


@MUTANTS.caught_by("check_no_pass_is_wasted")
class SelectionPassForNothing(Step):
    """The selection pass runs although all samples are selected or its losses are not used."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Evaluate the batch once more than needed."""
        if perturbed_losses is None:
            self.selection_pass(self.batch)
        return super().selection(losses, perturbed_losses)

    def ascent(self, batch: Any, part: Array) -> Any:
        """Keep the batch for later."""
        self.batch = batch
        return super().ascent(batch, part)


@MUTANTS.caught_by("check_golden_traces")
class RandomSelectionOneStepLate(Step):
    """`Random` draws for the next step."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Draw for the next count."""
        if self.config.select.rule != "random":
            return super().selection(losses, perturbed_losses)
        self.count += 1
        try:
            return super().selection(losses, perturbed_losses)
        finally:
            self.count -= 1


@MUTANTS.caught_by("check_random_selection_is_that_of_the_step")
class SelectionSeedCut(Step):
    """The seed of the selection is cut to 32 bits."""

    def selection(self, losses: Array, perturbed_losses: Array | None) -> Selection:
        """Use the lower bits."""
        seed = self.config.seed % 2**32
        return selectors.select(
            self.config.select, losses, perturbed_losses, seed=seed, count=self.count
        )


@MUTANTS.caught_by("check_proportional_selection")
class ProportionalSeedCut(SelectionSeedCut):
    """The seed of `Proportional` is cut to 32 bits."""
