"""Wrong directions of earlier steps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core import directions
from esam_core.conformance.numpy_adapter import NumpySession
from esam_core.reference.memory import Memory
from esam_core.reference.optimizers import BaseOptimizer
from esam_core.reference.step import Step
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
MUTANTS = Mutants()


class _OtherMemory(Step):
    """Steps that remember wrongly."""

    remembers: type[Memory] = Memory

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        super().__init__(model, config, settings, base)
        self.memory = self.remembers(config, model.units, self.perturb, base)


class _Turned(Memory):
    """The sign is not looked at."""

    def direction(self) -> dict[str, Array]:
        """Turn it round."""
        return {name: -g for name, g in super().direction().items()}


@MUTANTS.caught_by("check_climb_along_the_previous_gradient")
class WrongSign(_OtherMemory):
    """The climb goes the other way."""

    remembers = _Turned


@MUTANTS.caught_by("check_previous_is_sam_where_the_gradient_is_constant")
class DownhillOnALinearLoss(_OtherMemory):
    """The climb goes downhill: the loss at theta + epsilon is lower."""

    remembers = _Turned


@MUTANTS.caught_by("check_climb_along_the_momentum")
class MomentumWithTheOtherSign(_OtherMemory):
    """The climb goes along the momentum in place of against it."""

    remembers = _Turned


class _TwoAgo(Memory):
    """The gradient of the update before the last."""

    last: Mapping[str, Array] | None = None

    def record_update(self, gradient: Mapping[str, Array]) -> None:
        """Keep it one update longer."""
        if self.last is not None:
            super().record_update(self.last)
        self.last = {name: g.copy() for name, g in gradient.items()}


@MUTANTS.caught_by("check_climb_along_the_previous_gradient")
class StaleByTwo(_OtherMemory):
    """The direction is two updates old."""

    remembers = _TwoAgo


class _Average(Memory):
    """A running mean of the gradients."""

    def record_update(self, gradient: Mapping[str, Array]) -> None:
        """Mix the old ones in."""
        before = self.previous
        super().record_update(gradient)
        self.previous = {n: g + 0.5 * before.get(n, 0.0) for n, g in self.previous.items()}


@MUTANTS.caught_by("check_earlier_directions_beside_the_reference")
class PreviousIsAnAverage(_OtherMemory):
    """Gradients of all earlier updates are in the direction."""

    remembers = _Average


class _OnlyTheMask(Memory):
    """Only what one suffix perturbs is kept, whatever the norm."""

    def __init__(self, config: Any, units: Any, allowed: Any, base: Any) -> None:
        super().__init__(replace(config, norm="masked"), units, allowed, base)


@MUTANTS.caught_by("check_earlier_directions_beside_the_reference")
class FullNormOfWhatIsKept(_OtherMemory):
    """With `norm="full"` the norm is that of the perturbed units' gradient."""

    remembers = _OnlyTheMask


@MUTANTS.caught_by("check_first_step_is_a_base_step")
class FirstStepClimbs(Step):
    """In the first step, without a direction, the whole batch's gradient is taken."""

    def has_direction(self, mask: Mask) -> bool:
        """Say yes."""
        return True

    def ascent_indices(self, b: int) -> Array:
        """Climb along everything where there is nothing else."""
        right = super().ascent_indices(b)
        return np.arange(b) if len(right) == 0 and not self.memory.direction() else right


class _SecondMoments(Memory):
    """Adam's other moment."""

    def direction(self) -> dict[str, Array]:
        """Take the squares where there are any."""
        right = super().direction()
        if not isinstance(self.config.ascend, directions.Momentum) or self.base is None:
            return right
        moments = self.base.state()["moments"]
        return {name: self.config.ascend.sign * moments[name][-1] for name in right}


@MUTANTS.caught_by("check_momentum_of_each_base")
class SecondMomentTaken(_OtherMemory):
    """With Adam the mean of the squares is climbed along."""

    remembers = _SecondMoments


@MUTANTS.caught_by("check_momentum_without_a_past_is_previous")
class PreviousIsOfTheFirstUpdate(_OtherMemory):
    """The gradient of the first update is kept for good."""

    class remembers(Memory):  # noqa: N801 - a value of the attribute
        """Keeps the first."""

        def record_update(self, gradient: Mapping[str, Array]) -> None:
            """Keep it once."""
            if not self.previous:
                super().record_update(gradient)


class _AnyBase(BaseOptimizer):
    """A base that says that it has a first moment."""

    @property
    def has_moment(self) -> bool:
        """Say yes."""
        return True


@MUTANTS.caught_by("check_a_base_without_a_first_moment_is_refused")
class MomentumAroundAnyBase(Step):
    """A base without a first moment is taken, and every step is silently a base step."""

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        base.__class__ = _AnyBase
        super().__init__(model, config, settings, base)


@MUTANTS.caught_by("check_passes_without_an_ascent")
class LossesForNothing(Step):
    """The losses at theta are evaluated in every step."""

    def has_direction(self, mask: Mask) -> bool:
        """Evaluate the batch on the way."""
        right = super().has_direction(mask)
        if right and isinstance(self.config.ascend, directions.Previous | directions.Momentum):
            self.model.evaluate(self.batch, statistics="batch", update=False)
        return right

    def backward(self, batch: Any) -> Any:
        """Remember the batch."""
        self.batch = batch
        return super().backward(batch)


@MUTANTS.caught_by("check_rho_zero_with_any_direction")
class ZeroRadiusStillParts(Step):
    """With rho = 0 the passes of a part are made all the same."""

    def mask(self) -> Mask:
        """Draw a mask where there is nothing to perturb."""
        if not isinstance(self.config.ascend, directions.Part):
            return super().mask()
        return self.config.perturb.draw(self.model.units, seed=self.config.seed, count=self.count)


@MUTANTS.caught_by("check_one_direction_an_update")
class DirectionOfTheLastBackward(Step):
    """The gradient of the last `backward` is climbed along, in the same update as well."""

    def backward(self, batch: Any) -> Any:
        """Keep it at once."""
        gradient, report = super().backward(batch)
        self.memory.record_update(gradient)
        return gradient, report


@MUTANTS.caught_by("check_direction_is_saved")
class DirectionNotSaved(NumpySession):
    """A checkpoint does not hold the direction: the first step after it is a base step."""

    def state(self) -> dict[str, Any]:
        """Leave it out."""
        return {**super().state(), "direction": {}}


@MUTANTS.caught_by("check_a_failed_step_keeps_the_direction")
class DirectionUsedUp(Step):
    """The direction is let go of when it is used, also by a step that then fails."""

    def earlier_gradient(self, mask: Mask) -> list[Array | None]:
        """Take it out."""
        found = super().earlier_gradient(mask)
        self.used = True
        return found

    def restore(self, theta: Any) -> None:
        """Forget."""
        super().restore(theta)
        if getattr(self, "used", False):
            self.memory.previous = {}


@MUTANTS.caught_by("check_nonfinite_steps_with_any_direction")
class SkippedStepTakesTheDirection(_OtherMemory):
    """After a step that was skipped there is no direction."""

    class remembers(Memory):  # noqa: N801 - a value of the attribute
        """Takes an update without gradients for one."""

        def record_update(self, gradient: Mapping[str, Array]) -> None:
            """Keep nothing if there is nothing."""
            super().record_update(gradient)
            if not gradient:
                self.previous = {}
