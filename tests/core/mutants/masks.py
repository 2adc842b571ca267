"""Wrong masks, and masks of the wrong step."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.conformance.numpy_adapter import NumpySession, WatchedNetwork
from esam_core.reference.network import Evaluation, Network
from esam_core.reference.step import Step
from esam_core.samplers import Bernoulli, Only, RandomSuffix, Suffix
from esam_core.schedules import Sometimes
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
Scale = Sequence[float | Array]
MUTANTS = Mutants()


class _OtherCount(Step):
    """A mask drawn for a step other than this one."""

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
    """The mask is that of the previous step."""

    def other(self) -> int:
        """Return the previous count."""
        return max(0, self.count - 1)


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class SameMaskForever(_OtherCount):
    """The mask is drawn only once, as in a function that was traced once."""

    def other(self) -> int:
        """Return the first count."""
        return 0


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class CountNotAdvanced(Step):
    """The step count does not advance."""

    def backward(self, batch: Any) -> Any:
        """Run a step without counting it."""
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
        """Draw one number too many."""
        random.random()
        return super().mask()


@MUTANTS.caught_by("check_global_generators_are_left_alone")
class MaskFromNumpysGenerator(Step):
    """Something is drawn from NumPy's global generator."""

    def mask(self) -> Mask:
        """Draw one number too many."""
        np.random.random()  # noqa: NPY002 - the fault
        return super().mask()


@MUTANTS.caught_by("check_perturbation_follows_the_mask")
class MaskReportedNotUsed(Step):
    """The report names the mask, but everything is perturbed."""

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


@MUTANTS.caught_by("check_schedule_that_scales_rho")
class RhoNotScaled(Step):
    """A schedule's factor of rho is ignored."""

    def mask(self) -> Mask:
        """Ignore the factor."""
        return replace(super().mask(), rho_factor=1.0)


@MUTANTS.caught_by("check_schedule_that_scales_rho")
class RhoScaledInTheNorm(Step):
    """The factor of rho is treated as one over a probability, and enters the norm."""

    def mask(self) -> Mask:
        """Divide the probability of every unit by the factor."""
        mask = super().mask()
        rarer = tuple(p / mask.rho_factor for p in mask.probability)
        return replace(mask, probability=rarer, rho_factor=1.0)


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
        """Leave out the first perturbed block."""
        mask = super().mask()
        if not isinstance(self.config.perturb, Suffix):
            return mask
        first = next(u for u, m in zip(self.model.units, mask.perturbed, strict=True) if m)
        return mask.within(unit.block != first.block for unit in self.model.units)


@MUTANTS.caught_by("check_random_suffix")
class RandomSuffixByTheCut(Step):
    """All units of a random suffix use the probability of the cut, not their own."""

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
    """Scales and shifts of norm layers count as ordinary weights and biases."""

    @property
    def units(self) -> Any:
        """Return the units with wrong kinds."""
        return tuple(
            replace(u, kind=u.name.rpartition(".")[2]) if u.kind == "norm" else u
            for u in super().units
        )


@MUTANTS.caught_by("check_frozen_parameters")
class FlagsChanged(NumpySession):
    """Frozen parameters are unfrozen after a step."""

    unfrozen = False

    def passes(self, batch: Any, fault: Any) -> Any:
        """Unfreeze the parameters."""
        self.unfrozen = True
        return super().passes(batch, fault)

    def trainable(self) -> dict[str, bool]:
        """Return the flags after the step."""
        flags = super().trainable()
        return dict.fromkeys(flags, True) if self.unfrozen else flags


@MUTANTS.caught_by("check_frozen_parameters")
class FrozenPerturbed(Step):
    """Frozen parameters are perturbed too."""

    def apply_perturbation(self, epsilon: Sequence[Array]) -> None:
        """Also move the frozen parameters."""
        super().apply_perturbation(epsilon)
        trained = {unit.name for unit in self.model.units}
        self.frozen = {n: a.copy() for n, a in self.model.parameters.items() if n not in trained}
        for name in self.frozen:
            self.model.parameters[name] *= 1.05

    def restore(self, theta: Sequence[Array]) -> None:
        """Restore everything."""
        super().restore(theta)
        for name, saved in getattr(self, "frozen", {}).items():
            self.model.parameters[name][...] = saved


@MUTANTS.caught_by("check_everything_is_sam")
class OneUnitLeftAlone(Step):
    """With beta = 1 the last parameter is still not perturbed."""

    def mask(self) -> Mask:
        """Leave out the last unit."""
        mask = super().mask()
        sampler = self.config.perturb
        if not (isinstance(sampler, Bernoulli) and sampler.beta == 1.0):
            return mask
        last = len(mask.perturbed) - 1
        return mask.within(t != last for t in range(last + 1))


@MUTANTS.caught_by("check_each_step_has_its_own_mask")
class SeedOf32Bits(Step):
    """Only the low 32 bits of the seed are used."""

    def __init__(self, model: Any, config: Any, *others: Any) -> None:
        super().__init__(model, replace(config, seed=config.seed % 2**32), *others)


@MUTANTS.caught_by("check_frozen_parameters")
class FrozenUnitsDrawn(Step):
    """Random masks are drawn for frozen parameters too, so that those of the others move."""

    def mask(self) -> Mask:
        """Draw for all parameters, and keep those that are trained."""
        units = Network(self.model.layers).units
        config = self.config
        drawn = config.perturb.draw(units, seed=config.seed, count=self.count)
        trained = {unit.name for unit in self.model.units}
        places = [i for i, unit in enumerate(units) if unit.name in trained]
        kept = [(drawn.perturbed[i], drawn.probability[i]) for i in places]
        return replace(
            drawn, perturbed=tuple(m for m, _ in kept), probability=tuple(p for _, p in kept)
        )
