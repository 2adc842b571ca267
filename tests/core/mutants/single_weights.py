"""Wrong masks of single weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.reference.step import Step
from esam_core.samplers import Bernoulli
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


@MUTANTS.caught_by("check_masks_of_single_weights")
class WeightMaskDrawnOnce(Step):
    """Single weights are masked with the first step's mask in every step."""

    def mask(self) -> Mask:
        """Keep the seed of the first draw."""
        mask = super().mask()
        return replace(mask, weight_seed=None if mask.weight_seed is None else 7)


@MUTANTS.caught_by("check_masks_of_single_weights")
class WeightMaskNotApplied(Step):
    """`unit="weight"` perturbs every weight."""

    def mask(self) -> Mask:
        """Perturb all weights of each unit."""
        return replace(super().mask(), weight_beta=None, weight_seed=None)


@MUTANTS.caught_by("check_masks_of_single_weights")
class TensorsDrawnInsteadOfWeights(Step):
    """`unit="weight"` draws whole tensors."""

    def mask(self) -> Mask:
        """Draw the mask of `unit="tensor"`."""
        mask, right = super().mask(), self.config
        if mask.weight_beta is None:
            return mask
        self.config = replace(right, perturb=Bernoulli(mask.weight_beta))
        try:
            return super().mask()
        finally:
            self.config = right


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


@MUTANTS.caught_by("check_masks_of_single_weights")
class OneDrawPerRow(_OtherScales):
    """`unit="weight"` draws rows."""

    def others(self, scale: list[Array]) -> list[Array]:
        """Repeat the first draw of each row."""
        return [np.broadcast_to(s[:, :1], s.shape) if s.ndim == 2 else s for s in scale]


@MUTANTS.caught_by("check_masks_of_single_weights")
class OneDrawPerColumn(_OtherScales):
    """`unit="weight"` draws columns."""

    def others(self, scale: list[Array]) -> list[Array]:
        """Repeat the first draw of each column."""
        return [np.broadcast_to(s[:1], s.shape) if s.ndim == 2 else s for s in scale]


@MUTANTS.caught_by("check_norm_of_single_weights")
class NormOverAllWeights(Step):
    """With masks of single weights the norm is that of whole tensors."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by the norm of the tensors that contain the drawn weights."""
        epsilon = super().perturbation(g, scale)
        if self.config.norm == "none":
            return epsilon
        tensors = [float(np.max(s)) for s in scale]
        ratio = self.norm(g, scale) / self.norm(g, tensors)
        return [e * ratio for e in epsilon]


@MUTANTS.caught_by("check_single_weights_are_perturbed")
class WeightMaskOnlyInTheReport(Step):
    """The reported norm is that of the drawn weights, but all weights are perturbed."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Remember the perturbation of all weights."""
        self.every = super().perturbation(g, [float(np.max(s)) for s in scale])
        return super().perturbation(g, scale)

    def apply_perturbation(self, epsilon: Sequence[Array]) -> None:
        """Perturb all weights."""
        super().apply_perturbation(self.every)
