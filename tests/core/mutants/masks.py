"""Wrong masks, wrong rescaling, wrong norms."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.conformance.numpy_adapter import NumpySession, WatchedNetwork
from esam_core.perturbation import perturbation_norm, squared_norms
from esam_core.reference.network import Evaluation
from esam_core.reference.step import Step
from esam_core.samplers import Bernoulli, Only, RandomSuffix, Suffix
from esam_core.schedules import Sometimes
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
Scale = Sequence[float | Array]
MUTANTS = Mutants()


class _OtherCount(Step):
    """A mask drawn for another ascent than this one."""

    def other(self) -> int:
        """Return the wrong count."""
        raise NotImplementedError

    def mask(self) -> Mask:
        """Draw the mask of the wrong count."""
        right, self.count = self.count, self.other()
        try:
            return super().mask()
        finally:
            self.count = right


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class NextStepsMask(_OtherCount):
    """The mask is drawn for the next step, as the authors' code does."""

    def other(self) -> int:
        """Return the next count."""
        return self.count + 1


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class PreviousStepsMask(_OtherCount):
    """The mask is that of the step before."""

    def other(self) -> int:
        """Return the count before."""
        return max(0, self.count - 1)


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class SameMaskForever(_OtherCount):
    """The mask is drawn once: a function that was traced once."""

    def other(self) -> int:
        """Return the first count."""
        return 0


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class CountNotAdvanced(Step):
    """The counter of ascents stands still."""

    def backward(self, batch: Any) -> Any:
        """Make a step as if it had not been."""
        result = super().backward(batch)
        self.count = 0
        return result


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class SeedIgnored(Step):
    """Every seed gives the same masks."""

    def mask(self) -> Mask:
        """Draw from seed 0."""
        units = self.model.units
        return self.config.perturb.draw(units, seed=0, count=self.count)


@MUTANTS.caught_by("check_global_generators_are_left_alone")
class MaskFromPythonsGenerator(Step):
    """Something is drawn from Python's global generator."""

    def mask(self) -> Mask:
        """Draw a number too many."""
        random.random()
        return super().mask()


@MUTANTS.caught_by("check_global_generators_are_left_alone")
class MaskFromNumpysGenerator(Step):
    """Something is drawn from NumPy's global generator."""

    def mask(self) -> Mask:
        """Draw a number too many."""
        np.random.random()  # noqa: NPY002 - the fault
        return super().mask()


@MUTANTS.caught_by("check_perturbation_follows_the_mask")
class MaskReportedNotUsed(Step):
    """The report names the mask, and everything is perturbed."""

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Return all gradients."""
        everything = Mask((True,) * len(mask.perturbed), mask.probability)
        return super().ascent_gradient(ascent, everything)

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Perturb all units like the masked ones."""
        top = max(float(np.max(s)) for s in scale)
        return super().perturbation(g, [top] * len(scale))


@MUTANTS.caught_by("check_schedules")
class ScheduleRescaled(Step):
    """A step drawn by `Sometimes(p)` is perturbed 1/p as far."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by p."""
        epsilon = super().perturbation(g, scale)
        sampler = self.config.perturb
        return [e / sampler.p for e in epsilon] if isinstance(sampler, Sometimes) else epsilon


@MUTANTS.caught_by("check_suffix")
class SuffixRescaled(Step):
    """A fixed suffix is rescaled as if it were random."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by the share of units."""
        epsilon = super().perturbation(g, scale)
        share = sum(bool(np.any(s)) for s in scale) / len(scale)
        return [e / share for e in epsilon] if isinstance(self.config.perturb, Suffix) else epsilon


@MUTANTS.caught_by("check_suffix")
class SuffixStartsTooLate(Step):
    """The block named by `Suffix` is left out."""

    def mask(self) -> Mask:
        """Leave the first perturbed block out."""
        mask = super().mask()
        if not isinstance(self.config.perturb, Suffix):
            return mask
        first = next(u for u, m in zip(self.model.units, mask.perturbed, strict=True) if m)
        return mask.within(unit.block != first.block for unit in self.model.units)


@MUTANTS.caught_by("check_random_suffix")
class RandomSuffixByTheCut(Step):
    """All units of a random suffix are divided by the cut's probability, not by their own."""

    def mask(self) -> Mask:
        """Give every unit the probability of the first perturbed one."""
        mask = super().mask()
        if not isinstance(self.config.perturb, RandomSuffix):
            return mask
        p = mask.probability[mask.perturbed.index(True)]
        return replace(mask, probability=(p,) * len(mask.probability))


@MUTANTS.caught_by("check_only_one_kind")
class OnlyIgnored(Step):
    """`Only` perturbs every kind."""

    def mask(self) -> Mask:
        """Draw from the inner sampler alone."""
        sampler = self.config.perturb
        if not isinstance(sampler, Only):
            return super().mask()
        return sampler.inner.draw(self.model.units, seed=self.config.seed, count=self.count)


@MUTANTS.caught_by("check_only_one_kind")
class NormLayersTakenForWeights(WatchedNetwork):
    """Scales and shifts of norm layers pass for ordinary weights and biases."""

    @property
    def units(self) -> Any:
        """Return the units with wrong kinds."""
        return tuple(
            replace(u, kind=u.name.rpartition(".")[2]) if u.kind == "norm" else u
            for u in super().units
        )


@MUTANTS.caught_by("check_masks_of_single_weights")
class WeightMaskDrawnOnce(Step):
    """Single weights are masked with the first step's mask in every step."""

    def mask(self) -> Mask:
        """Keep the seed of the native draw."""
        mask = super().mask()
        return replace(mask, weight_seed=None if mask.weight_seed is None else 7)


@MUTANTS.caught_by("check_masks_of_single_weights")
class WeightMaskNotApplied(Step):
    """`unit="weight"` perturbs every weight."""

    def mask(self) -> Mask:
        """Forget that single weights are drawn."""
        return replace(super().mask(), weight_beta=None, weight_seed=None)


@MUTANTS.caught_by("check_frozen_parameters")
class FlagsChanged(NumpySession):
    """Frozen parameters come out of a step unfrozen."""

    unfrozen = False

    def passes(self, batch: Any, fault: Any) -> Any:
        """Unfreeze in passing."""
        self.unfrozen = True
        return super().passes(batch, fault)

    def trainable(self) -> dict[str, bool]:
        """Return the flags as the step left them."""
        flags = super().trainable()
        return dict.fromkeys(flags, True) if self.unfrozen else flags


@MUTANTS.caught_by("check_frozen_parameters")
class FrozenPerturbed(Step):
    """Frozen parameters are perturbed as well."""

    def climb(self, epsilon: Sequence[Array]) -> None:
        """Move everything that is frozen too."""
        super().climb(epsilon)
        trained = {unit.name for unit in self.model.units}
        self.frozen = {n: a.copy() for n, a in self.model.parameters.items() if n not in trained}
        for name in self.frozen:
            self.model.parameters[name] *= 1.05

    def restore(self, theta: Sequence[Array]) -> None:
        """Put everything back."""
        super().restore(theta)
        for name, saved in getattr(self, "frozen", {}).items():
            self.model.parameters[name][...] = saved


@MUTANTS.caught_by("check_radius")
class NoRescaling(Step):
    """No 1/beta."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Use m in place of m/p."""
        return super().perturbation(g, [np.asarray(np.asarray(s) > 0, float) for s in scale])


@MUTANTS.caught_by("check_radius")
class RadiusShrunk(Step):
    """A radius a little smaller than asked for."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Shrink by a thousandth."""
        return [0.999 * e for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_radius")
class NormPerTensor(Step):
    """Each tensor is divided by its own norm."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide each by its own."""
        epsilon = super().perturbation(g, scale)
        common = self.norm(g, scale)
        own = np.sqrt(squared_norms(g, self.theta, self.adaptive))
        return [e * common / n if n else e for e, n in zip(epsilon, own, strict=True)]


@MUTANTS.caught_by("check_radius")
class NormSquared(Step):
    """The square root of the norm is forgotten."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by the norm once more."""
        length = self.norm(g, scale)
        return [e / length if length else e for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_norm_is_that_of_the_masked_units")
class NormOverEverything(Step):
    """The norm is the whole gradient's where that of the masked units is asked for."""

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Return all gradients."""
        everything = Mask((True,) * len(mask.perturbed), mask.probability)
        return super().ascent_gradient(ascent, everything)

    def norm(self, g: Sequence[Array | None], scale: Scale) -> float:
        """Return the norm of all of them."""
        return perturbation_norm(g, self.theta, scale, norm="full", adaptive=self.adaptive)

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by it."""
        masked = perturbation_norm(g, self.theta, scale, norm="masked", adaptive=self.adaptive)
        ratio = masked / self.norm(g, scale)
        return [e * ratio for e in super().perturbation(g, scale)]


class _WrongMode(Step):
    """One norm in place of another."""

    mode, in_place_of = "masked", ""

    def __init__(self, model: Any, config: Any, settings: Any = None) -> None:
        if config.norm == self.in_place_of:
            config = replace(config, norm=self.mode)
        super().__init__(model, config, settings)


@MUTANTS.caught_by("check_norm_modes")
class EstimatedNormUnweighted(_WrongMode):
    """`norm="estimated"` leaves the 1/p out."""

    in_place_of = "estimated"


@MUTANTS.caught_by("check_norm_modes")
class FullNormOfThePart(_WrongMode):
    """`norm="full"` takes the norm of the masked units."""

    in_place_of = "full"


@MUTANTS.caught_by("check_norm_modes")
class NoneNormalised(_WrongMode):
    """`norm="none"` normalises after all."""

    in_place_of = "none"


@MUTANTS.caught_by("check_norm_modes")
class EstimatedNormSquaredProbability(Step):
    """`norm="estimated"` divides the squares by p twice."""

    def norm(self, g: Sequence[Array | None], scale: Scale) -> float:
        """Divide twice."""
        squares = scale if self.config.norm != "estimated" else [s * s for s in scale]
        return super().norm(g, squares)

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by that norm."""
        ratio = super().norm(g, scale) / self.norm(g, scale)
        return [e * ratio for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_norm_eps")
class NormEpsMissing(Step):
    """`norm_eps` is not added."""

    def __init__(self, model: Any, config: Any, settings: Any = None) -> None:
        super().__init__(model, replace(config, norm_eps=1e-300), settings)


@MUTANTS.caught_by("check_zero_gradient")
class ZeroOverZero(Step):
    """A zero gradient is divided by its norm unguarded."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide 0 by 0 where that comes up."""
        length = np.float64(self.norm(g, scale))
        return [e * (length / length) for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_adaptive")
class AdaptiveWithoutTheSquare(Step):
    """Adaptive: epsilon is along |theta| g in place of theta^2 g."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Take one |theta| out."""
        epsilon = super().perturbation(g, scale)
        return [
            e / np.where(theta == 0, 1, np.abs(theta)) if adaptive else e
            for e, theta, adaptive in zip(epsilon, self.theta, self.adaptive, strict=True)
        ]


@MUTANTS.caught_by("check_adaptive")
class AdaptiveNormOfThePlainGradient(Step):
    """Adaptive: the norm is that of g in place of |theta| g."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Exchange the norms."""
        plain = [False] * len(self.theta)
        wrong = perturbation_norm(g, self.theta, scale, norm="masked", adaptive=plain)
        ratio = self.norm(g, scale) / wrong if any(self.adaptive) else 1.0
        return [e * ratio for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_adaptive")
class AdaptiveIgnored(Step):
    """`adaptive` does nothing."""

    def __init__(self, model: Any, config: Any, settings: Any = None) -> None:
        super().__init__(model, replace(config, adaptive=False), settings)


class _SettingIgnored(Step):
    """One of the settings of single parameters is not looked at."""

    ignored = ""

    def __init__(self, model: Any, config: Any, settings: Any = None) -> None:
        kept = {
            name: {key: value for key, value in own.items() if key != self.ignored}
            for name, own in (settings or {}).items()
        }
        super().__init__(model, config, kept)


@MUTANTS.caught_by("check_groups")
class GroupRhoIgnored(_SettingIgnored):
    """A parameter's own rho is overwritten."""

    ignored = "rho"


@MUTANTS.caught_by("check_groups")
class GroupAdaptiveIgnored(_SettingIgnored):
    """A parameter's own `adaptive` is overwritten."""

    ignored = "adaptive"


@MUTANTS.caught_by("check_groups")
class GroupPerturbIgnored(_SettingIgnored):
    """A parameter's own `perturb=False` is overwritten."""

    ignored = "perturb"


@MUTANTS.caught_by("check_groups")
class NormPerRadius(Step):
    """Parameters of different rho have each their own norm."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide each group by its own."""
        epsilon = super().perturbation(g, scale)
        common = self.norm(g, scale)
        squares = squared_norms(g, self.theta, self.adaptive)
        own = {
            rho: np.sqrt(sum(s for s, r in zip(squares, self.rho, strict=True) if r == rho))
            for rho in self.rho
        }
        return [
            e * common / own[r] if own[r] else e for e, r in zip(epsilon, self.rho, strict=True)
        ]


@MUTANTS.caught_by("check_convolution")
class KernelsLeftAlone(Step):
    """Tensors of more than two axes are not perturbed."""

    def climb(self, epsilon: Sequence[Array]) -> None:
        """Move matrices and vectors only."""
        super().climb([e if e.ndim <= 2 else 0 * e for e in epsilon])


@MUTANTS.caught_by("check_everything_is_sam")
class OneUnitLeftAlone(Step):
    """With beta = 1 the last parameter is still not perturbed."""

    def mask(self) -> Mask:
        """Leave the last unit out."""
        mask = super().mask()
        sampler = self.config.perturb
        if not (isinstance(sampler, Bernoulli) and sampler.beta == 1.0):
            return mask
        last = len(mask.perturbed) - 1
        return mask.within(t != last for t in range(last + 1))
