"""What a step is to do: drawn on the host, from the number of the ascent alone.

A `Plan` is what a compiled step is specialised on: it is hashable, and there is one compiled
function a plan. What changes from step to step beyond that enters as `Inputs`. A sampler whose
masks can be listed gets a plan a mask, so that the compiler drops every gradient and forward that
the mask makes needless; any other mask is an input that is multiplied in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from esam_core import ESAMConfig, Mask, Unit, selectors

__all__ = ["BASE", "Drawn", "Plan", "Planner"]

#: Names of the inputs of a compiled step.
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """The static part of a step.

    Args:
        active: whether anything is perturbed. If not, the step is the base optimizer's own.
        scale: T factors m_t / p_t where the mask is known before compilation; None where they
            come as the input "scale".
        rho_factor: what rho is multiplied by.
        weight_beta: share of the scalar weights that are perturbed where those are drawn singly.
        kept: "all" samples enter the descent pass, "some", or "one", which has no statistics.
    """

    active: bool = True
    scale: tuple[float, ...] | None = None
    rho_factor: float = 1.0
    weight_beta: float | None = None
    kept: str = "all"

    @property
    def after_climb(self) -> "Plan":
        """The plan of phases 4 to 7, which is the same for all masks."""
        return Plan(kept=self.kept)


#: An ordinary step of the base optimizer.
BASE = Plan(active=False)


@dataclass(frozen=True)
class Drawn:
    """One step's plan, inputs and mask."""

    plan: Plan
    mask: Mask
    inputs: Inputs = field(default_factory=dict)


class Planner:
    """Draws the plan of each step.

    Args:
        config: the hyperparameters.
        units: the records of the trainable variables.
        perturbable: T booleans; a unit that is not never enters a mask.
    """

    def __init__(
        self, config: ESAMConfig, units: Sequence[Unit], perturbable: Sequence[bool]
    ) -> None:
        self.config = config
        self.units = tuple(units)
        self.allowed = [p and config.rho > 0.0 for p in perturbable]
        listed = config.perturb.masks(self.units) if self.units else ()
        self._listed = None if listed is None else {mask.within(self.allowed) for mask in listed}

    @property
    def climbs_are_many(self) -> bool:
        """Whether several masks are listed that perturb something."""
        return self._listed is not None and sum(mask.active for mask in self._listed) > 1

    def draw(self, count: int, batch_size: int, *, compiled: bool) -> Drawn:
        """Return what ascent number `count` does on a batch of this size.

        Args:
            count: >= 0.
            batch_size: b >= 1.
            compiled: whether the step is compiled for its plan. If not, a plan a mask costs
                nothing, and each step gets its own.
        """
        config = self.config
        if not self.units:
            return Drawn(BASE, Mask((), ()))
        mask = config.perturb.draw(self.units, seed=config.seed, count=count).within(self.allowed)
        if not mask.active:
            return Drawn(BASE, mask)
        inputs: Inputs = {}
        scale = mask.scale if not compiled or self._is_listed(mask) else None
        if scale is None:
            inputs["scale"] = np.asarray(mask.scale, dtype=np.float32)
        if mask.weight_seed is not None:
            inputs["weight_seed"] = _two_words(mask.weight_seed)
        k = selectors.subset_size(config.select.gamma, batch_size)
        kept = "one" if k == 1 else "all" if k == batch_size else "some"
        if kept != "all" and k < batch_size:
            inputs.update(self._selection_inputs(batch_size, k, count))
        plan = Plan(True, scale, mask.rho_factor, mask.weight_beta, kept)
        return Drawn(plan, mask, inputs)

    def _is_listed(self, mask: Mask) -> bool:
        """Return whether the sampler listed this mask, which makes it worth compiling for."""
        return self._listed is not None and mask in self._listed

    def _selection_inputs(self, b: int, k: int, count: int) -> Inputs:
        """Return what the selection needs of the host's random numbers."""
        config = self.config
        if config.select.rule == "random":
            drawn = selectors.random_indices(b, k, seed=config.seed, count=count)
            return {"indices": drawn.astype(np.int32)}
        if config.select.rule == "proportional":
            offset = selectors.systematic_offset(seed=config.seed, count=count)
            return {"offset": np.asarray(offset, dtype=np.float64)}
        return {}


def _two_words(seed: int) -> np.ndarray:
    """Return a seed in [0, 2**63) as two int32 words with the same bits."""
    return np.array([seed], dtype="<u8").view("<i4")
