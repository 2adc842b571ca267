"""Wrong parts of the batch, and wrong passes over them."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core import directions
from esam_core.draws import uniforms
from esam_core.reference.network import Evaluation
from esam_core.reference.step import Step, subset
from esam_core.selectors import needs_losses, random_indices, top_indices
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


class _OtherPart(Step):
    """A part of the batch other than that of (seed, count)."""

    def ascent_indices(self, b: int) -> Array:
        """Return the wrong part."""
        right = super().ascent_indices(b)
        return self.instead(b, len(right)) if 0 < len(right) < b else right

    def instead(self, b: int, n: int) -> Array:
        """Return n wrong indices."""
        raise NotImplementedError


@MUTANTS.caught_by("check_climb_along_a_part")
class PartFromAnotherStream(_OtherPart):
    """The part is drawn with other random numbers than `Random`."""

    def instead(self, b: int, n: int) -> Array:
        """Draw from a separate stream."""
        keys = uniforms(b, seed=self.config.seed, count=self.count, stream=7)
        return top_indices(keys, n)


@MUTANTS.caught_by("check_climb_along_a_part")
class FirstSamplesClimb(_OtherPart):
    """The part consists of the first samples of the batch."""

    def instead(self, b: int, n: int) -> Array:
        """Take the first."""
        return np.arange(n)


@MUTANTS.caught_by("check_climb_along_a_part")
class PartReportedNotUsed(Step):
    """The part is reported, but the direction is that of the whole batch."""

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Evaluate the part, and keep the whole batch's gradient for later."""
        state = self.model.forward_state
        self.whole = super().ascent(batch, np.arange(len(batch.targets)))
        self.model.forward_state = state
        return super().ascent(batch, part)

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Return the gradient of the whole batch."""
        return super().ascent_gradient(self.whole, mask)


@MUTANTS.caught_by("check_smaller_parts_lie_within_larger_ones")
class PartsNotNested(_OtherPart):
    """Each share has its own draw: a smaller part need not be a subset of a larger one."""

    def instead(self, b: int, n: int) -> Array:
        """Make the stream depend on the size."""
        keys = uniforms(b, seed=self.config.seed, count=self.count, stream=100 + n)
        return top_indices(keys, n)


@MUTANTS.caught_by("check_smaller_parts_lie_within_larger_ones")
class SamePartForever(_OtherPart):
    """Every step uses the same positions of the batch."""

    def instead(self, b: int, n: int) -> Array:
        """Draw for the first count."""
        return directions.climbing_indices(self.config.ascend, b, seed=self.config.seed, count=0)


class _OtherRecords(Step):
    """The wrong pass updates the statistics and the random state."""

    def records_at_theta(self, b: int) -> bool:
        """Return the wrong answer."""
        right = super().records_at_theta(b)
        return self.instead(right, b) if isinstance(self.config.ascend, directions.Part) else right

    def instead(self, right: bool, b: int) -> bool:
        """Return the wrong answer."""
        raise NotImplementedError


@MUTANTS.caught_by("check_part_of_everything_is_the_batch")
class PartOfEverythingIsAPart(_OtherRecords):
    """With `Part(1.0)` the descent pass updates the running statistics."""

    def instead(self, right: bool, b: int) -> bool:
        """Ignore the share."""
        return False


@MUTANTS.caught_by("check_statistics_with_a_part")
class StatisticsOfThePart(_OtherRecords):
    """The running statistics are those of the part, at theta."""

    def instead(self, right: bool, b: int) -> bool:
        """Return that it is the ascent pass."""
        return True


@MUTANTS.caught_by("check_random_state_with_a_part")
class RandomStateOfThePart(StatisticsOfThePart):
    """The generator is left where the forward of the part leaves it."""


@MUTANTS.caught_by("check_statistics_with_a_part")
class StatisticsOfPartAndDescent(Step):
    """The part updates the running statistics, and the descent pass updates them again."""

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Update here too."""
        state = self.model.forward_state
        self.model.evaluate(subset(batch, part), statistics="batch", update=True)
        self.model.forward_state = state
        return super().ascent(batch, part)


@MUTANTS.caught_by("check_constant_statistics_are_refused")
class ConstantStatisticsAccepted(Step):
    """BatchNorm trains although no pass updates its running statistics."""

    def check_statistics(self, b: int) -> None:
        """Accept everything."""


@MUTANTS.caught_by("check_parts_with_every_selector")
class RestScoredAtThePeak(Step):
    """The losses of the samples outside the part are those at theta + epsilon."""

    def scoring_pass(self, batch: Any, part: Array, losses: Array | None) -> Array:
        """Shift the losses."""
        found = super().scoring_pass(batch, part, losses)
        if losses is not None:
            rest = np.setdiff1d(np.arange(len(found)), part)
            found[rest] *= 1.1
        return found


@MUTANTS.caught_by("check_parts_with_every_selector")
class LossesInOrderOfThePasses(Step):
    """The losses of the part come first, then those of the others, in the wrong order."""

    def scoring_pass(self, batch: Any, part: Array, losses: Array | None) -> Array:
        """Concatenate the losses."""
        found = super().scoring_pass(batch, part, losses)
        if losses is None:
            return found
        return np.concatenate([losses, found[np.setdiff1d(np.arange(len(found)), part)]])


@MUTANTS.caught_by("check_passes_with_a_part")
class RestScoredForNothing(Step):
    """The samples outside the part are evaluated although no selector needs their losses."""

    def ascent(self, batch: Any, part: Array) -> Evaluation:
        """Evaluate the others as well."""
        b = len(batch.targets)
        found = super().ascent(batch, part)
        if len(part) < b and not needs_losses(self.config.select, b):
            self.scoring_pass(batch, part, found.losses)
        return found


@MUTANTS.caught_by("check_golden_traces_of_directions")
class PartOneStepLate(_OtherPart):
    """The part is that of the next step."""

    def instead(self, b: int, n: int) -> Array:
        """Draw for the next count."""
        ascend = self.config.ascend
        count = self.count + 1
        return directions.climbing_indices(ascend, b, seed=self.config.seed, count=count)


class _OtherSize(Step):
    """A part with another number of samples than ceil(share b)."""

    def size(self, share: float, b: int) -> int:
        """Return the wrong number."""
        raise NotImplementedError

    def ascent_indices(self, b: int) -> Array:
        """Draw the wrong number of samples."""
        ascend = self.config.ascend
        if not isinstance(ascend, directions.Part):
            return super().ascent_indices(b)
        n = self.size(ascend.share, b)
        return random_indices(b, n, seed=self.config.seed, count=self.count)


@MUTANTS.caught_by("check_size_of_a_part")
class PartRounded(_OtherSize):
    """The part has round(share b) samples: 2 of 8 for .3."""

    def size(self, share: float, b: int) -> int:
        """Round to the nearest integer."""
        return max(1, round(share * b))


@MUTANTS.caught_by("check_size_of_a_part")
class PartByFloatCeiling(_OtherSize):
    """The part has the ceiling of a float product: 8 of 100 for .07."""

    def size(self, share: float, b: int) -> int:
        """Round up the float product."""
        return math.ceil(share * b)


@MUTANTS.caught_by("check_climb_along_a_part")
class PartSeedCut(Step):
    """The seed of the part is cut to 32 bits."""

    def ascent_indices(self, b: int) -> Array:
        """Use the lower bits."""
        seed = self.config.seed % 2**32
        return directions.climbing_indices(self.config.ascend, b, seed=seed, count=self.count)
