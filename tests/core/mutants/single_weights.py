"""Wrong masks of single weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.reference.step import Step
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
Scale = Sequence[float | Array]
MUTANTS = Mutants()


@MUTANTS.caught_by("check_masks_of_single_weights")
class SeedOfSingleWeightsIgnored(Step):
    """Masks of single weights depend on the step alone, not on the seed."""

    def mask(self) -> Mask:
        """Replace the seed of the weights."""
        mask = super().mask()
        return mask if mask.weight_seed is None else replace(mask, weight_seed=self.count)


class _OtherScales(Step):
    """Factors m / p of single weights that are wrong."""

    def others(self, scale: list[Array]) -> list[Array]:
        """Return the wrong factors of all tensors."""
        raise NotImplementedError

    def _wrong(self, scale: Scale) -> Scale:
        """Return the wrong factors where single weights are drawn."""
        arrays = [s for s in scale if isinstance(s, np.ndarray)]
        return self.others(arrays) if len(arrays) == len(scale) else scale

    def norm(self, g: Sequence[Array | None], scale: Scale) -> float:
        """Use the wrong factors."""
        return super().norm(g, self._wrong(scale))

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Use the wrong factors."""
        return super().perturbation(g, self._wrong(scale))


@MUTANTS.caught_by("check_tensors_draw_their_own_single_weights")
class OneKeyForAllTensors(_OtherScales):
    """Tensors of one size get the same draws."""

    def others(self, scale: list[Array]) -> list[Array]:
        """Repeat the draws of the first tensor of each size."""
        first: dict[int, Array] = {}
        return [first.setdefault(s.size, s).reshape(s.shape) for s in scale]


@MUTANTS.caught_by("check_groups_with_single_weights")
class BiasesAreNotDrawn(_OtherScales):
    """Single weights are drawn from matrices alone."""

    def others(self, scale: list[Array]) -> list[Array]:
        """Leave out vectors."""
        return [s if s.ndim > 1 else np.zeros_like(s) for s in scale]


@MUTANTS.caught_by("check_groups_with_single_weights")
class ExcludedWeightsDrawn(Step):
    """`perturb=False` has no effect where single weights are drawn."""

    def mask(self) -> Mask:
        """Draw from all units."""
        drawn = self.config.perturb.draw(self.model.units, seed=self.config.seed, count=self.count)
        return super().mask() if drawn.weight_beta is None else drawn


@MUTANTS.caught_by("check_adaptive_with_single_weights")
class NotAdaptiveWithSingleWeights(Step):
    """`adaptive` has no effect where single weights are drawn."""

    def mask(self) -> Mask:
        """Do not scale by the weights."""
        mask = super().mask()
        if mask.weight_beta is not None:
            self.adaptive = [False] * len(self.adaptive)
        return mask
