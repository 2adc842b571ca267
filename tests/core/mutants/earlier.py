"""Wrong ascent directions from earlier steps."""

from collections.abc import Mapping, Sequence
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
    """Steps with a wrong memory."""

    remembers: type[Memory] = Memory

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        super().__init__(model, config, settings, base)
        self.memory = self.remembers(config, model.units, self.perturb, base)


class _Turned(Memory):
    """The sign is ignored."""

    def direction(self) -> dict[str, Array]:
        """Reverse the direction."""
        return {name: -g for name, g in super().direction().items()}


@MUTANTS.caught_by("check_climb_along_the_previous_gradient")
class WrongSign(_OtherMemory):
    """The direction has the wrong sign."""

    remembers = _Turned


@MUTANTS.caught_by("check_previous_is_sam_where_the_gradient_is_constant")
class DownhillOnALinearLoss(_OtherMemory):
    """The perturbation decreases the loss: it is lower at theta + epsilon."""

    remembers = _Turned


@MUTANTS.caught_by("check_climb_along_the_momentum")
class MomentumWithTheOtherSign(_OtherMemory):
    """The perturbation is along the momentum instead of against it."""

    remembers = _Turned


class _TwoAgo(Memory):
    """The gradient of the update before the last."""

    last: Mapping[str, Array] | None = None

    def record_update(self, gradient: Mapping[str, Array]) -> None:
        """Keep the gradient one update longer."""
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
        """Average with the old gradients."""
        before = self.previous
        super().record_update(gradient)
        self.previous = {n: g + 0.5 * before.get(n, 0.0) for n, g in self.previous.items()}


@MUTANTS.caught_by("check_earlier_directions_beside_the_reference")
class PreviousIsAnAverage(_OtherMemory):
    """The direction contains the gradients of all earlier updates."""

    remembers = _Average


class _OnlyTheMask(Memory):
    """Only the gradients of one suffix are kept, for every norm."""

    def __init__(self, config: Any, units: Any, allowed: Any, base: Any) -> None:
        super().__init__(replace(config, norm="masked"), units, allowed, base)


@MUTANTS.caught_by("check_earlier_directions_beside_the_reference")
class FullNormOfWhatIsKept(_OtherMemory):
    """With `norm="full"` the norm is that of the perturbed units' gradient."""

    remembers = _OnlyTheMask


@MUTANTS.caught_by("check_first_step_is_a_base_step")
class FirstStepClimbs(Step):
    """The first step, which has no direction, uses the whole batch's gradient."""

    def has_direction(self, mask: Mask) -> bool:
        """Always return True."""
        return True

    def ascent_indices(self, b: int) -> Array:
        """Use the whole batch if there is no direction."""
        right = super().ascent_indices(b)
        return np.arange(b) if len(right) == 0 and not self.memory.direction() else right


class _SecondMoments(Memory):
    """Adam's other moment."""

    def direction(self) -> dict[str, Array]:
        """Return the squares if there are any."""
        right = super().direction()
        if not isinstance(self.config.ascend, directions.Momentum) or self.base is None:
            return right
        moments = self.base.state()["moments"]
        return {name: self.config.ascend.sign * moments[name][-1] for name in right}


@MUTANTS.caught_by("check_momentum_of_each_base")
class SecondMomentTaken(_OtherMemory):
    """With Adam the mean of the squares is the direction."""

    remembers = _SecondMoments


@MUTANTS.caught_by("check_momentum_without_a_past_is_previous")
class PreviousIsOfTheFirstUpdate(_OtherMemory):
    """The gradient of the first update is kept forever."""

    class remembers(Memory):  # noqa: N801 - a value of the attribute
        """Keeps only the first gradient."""

        def record_update(self, gradient: Mapping[str, Array]) -> None:
            """Keep the gradient once."""
            if not self.previous:
                super().record_update(gradient)


class _AnyBase(BaseOptimizer):
    """A base optimizer that claims to have a first moment."""

    @property
    def has_moment(self) -> bool:
        """Always return True."""
        return True


@MUTANTS.caught_by("check_a_base_without_a_first_moment_is_refused")
class MomentumAroundAnyBase(Step):
    """A base optimizer without a first moment is accepted: every step is silently a base step."""

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        base.__class__ = _AnyBase
        super().__init__(model, config, settings, base)


@MUTANTS.caught_by("check_passes_without_an_ascent")
class LossesForNothing(Step):
    """The losses at theta are evaluated in every step."""

    def has_direction(self, mask: Mask) -> bool:
        """Evaluate the batch needlessly."""
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
    """With rho = 0 the passes on a part still run."""

    def mask(self) -> Mask:
        """Draw a mask although there is nothing to perturb."""
        if not isinstance(self.config.ascend, directions.Part):
            return super().mask()
        return self.config.perturb.draw(self.model.units, seed=self.config.seed, count=self.count)


@MUTANTS.caught_by("check_one_direction_an_update")
class DirectionOfTheLastBackward(Step):
    """The gradient of the last `backward` is the direction, even within the same update."""

    def backward(self, batch: Any) -> Any:
        """Keep the gradient immediately."""
        gradient, report = super().backward(batch)
        self.memory.record_update(gradient)
        return gradient, report


@MUTANTS.caught_by("check_direction_is_saved")
class DirectionNotSaved(NumpySession):
    """A checkpoint does not contain the direction: the first step after loading is a base step."""

    def state(self) -> dict[str, Any]:
        """Leave the direction out."""
        return {**super().state(), "direction": {}}


@MUTANTS.caught_by("check_a_failed_step_keeps_the_direction")
class DirectionUsedUp(Step):
    """The direction is dropped when it is used, even by a step that then fails."""

    def earlier_gradient(self, mask: Mask) -> list[Array | None]:
        """Mark the direction for removal."""
        found = super().earlier_gradient(mask)
        self.used = True
        return found

    def restore(self, theta: Any) -> None:
        """Drop the direction."""
        super().restore(theta)
        if getattr(self, "used", False):
            self.memory.previous = {}


@MUTANTS.caught_by("check_nonfinite_steps_with_any_direction")
class SkippedStepTakesTheDirection(_OtherMemory):
    """After a skipped step there is no direction."""

    class remembers(Memory):  # noqa: N801 - a value of the attribute
        """Counts an update without gradients as an update."""

        def record_update(self, gradient: Mapping[str, Array]) -> None:
            """Keep an empty direction if there are no gradients."""
            super().record_update(gradient)
            if not gradient:
                self.previous = {}


@MUTANTS.caught_by("check_loading_replaces_the_direction")
class LoadingKeepsTheDirection(NumpySession):
    """Loading a state without a direction keeps that of the session."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Replace the direction only by another one."""
        kept = dict(self.esam.memory.previous) if self.esam else {}
        super().load({**state, "direction": state["direction"] or kept})


@MUTANTS.caught_by("check_a_nan_loss_beside_a_finite_direction")
class NaNLossesPerturbNothing(Step):
    """If a loss at theta is NaN, a finite direction does not perturb."""

    flawed = False

    def scoring_pass(self, batch: Any, part: Array, losses: Array | None) -> Array:
        """Look at the losses."""
        found = super().scoring_pass(batch, part, losses)
        self.flawed = not bool(np.isfinite(found).all())
        return found

    def perturbation(self, g: Sequence[Array | None], scale: Sequence[Any]) -> list[Array]:
        """Return zeros for non-finite losses."""
        return [e * (not self.flawed) for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_random_state_with_an_earlier_direction")
class DescentAdvancesTheGenerator(Step):
    """After a pass over the whole batch, the random state is that of the descent pass."""

    def records_at_theta(self, b: int) -> bool:
        """Record in the descent pass."""
        return not isinstance(self.config.ascend, directions.Previous) and super().records_at_theta(
            b
        )
