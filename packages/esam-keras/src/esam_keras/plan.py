"""The plan of a step, drawn on the host from the step count.

A `Plan` is the static part of a compiled step: it is hashable, and there is one compiled function
per plan. Everything else that changes from step to step is in `Inputs`. A sampler whose masks can
be listed gets one plan per mask, and the compiler drops all gradients and forwards that the mask
does not need. Any other mask is an input that multiplies the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from esam_core import ESAMConfig, Mask, Momentum, Part, Previous, Unit, selectors
from esam_core.directions import climbing_indices, records_at_theta

__all__ = ["BASE", "WHOLE", "Ascent", "Drawn", "Plan", "Planner"]

#: The inputs of a compiled step, by name.
Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Ascent:
    """The source of a step's ascent direction, and what the step evaluates at theta.

    Args:
        of: the "batch", a "part" of it, or an "earlier" step.
        scores: whether another pass at theta computes the losses of the samples that are not in the
            ascent pass, because the selection needs them.
        records: whether a pass at theta updates the statistics and the random state; if not, the
            descent pass does.
        part_alone: whether the part is one sample of several, which has no batch statistics.
        rest_alone: the same for the samples outside the part.
    """

    of: str = "batch"
    scores: bool = False
    records: bool = True
    part_alone: bool = False
    rest_alone: bool = False

    @property
    def sees_all(self) -> bool:
        """Whether the predictions for the whole batch at theta are known."""
        return self.of == "batch" or self.scores


#: The ascent pass uses the whole batch.
WHOLE = Ascent()


@dataclass(frozen=True)
class Plan:
    """The static part of a step.

    Args:
        active: whether anything is perturbed. If not, the step is a base step.
        scale: T factors m_t / p_t if the mask is known before compilation; None if they are the
            input "scale".
        rho_factor: the factor of rho.
        weight_beta: share of the scalar weights that are perturbed, if weights are drawn singly.
        kept: whether "all", "some" or "one" of several samples are selected; one of several has no
            batch statistics.
        ascent: the source of the ascent direction.
    """

    active: bool = True
    scale: tuple[float, ...] | None = None
    rho_factor: float = 1.0
    weight_beta: float | None = None
    kept: str = "all"
    ascent: Ascent = WHOLE


#: A base step.
BASE = Plan(active=False)


@dataclass(frozen=True)
class Drawn:
    """One step's plan and mask, the size of its batch, and its inputs."""

    plan: Plan
    mask: Mask
    batch_size: int
    inputs: Inputs = field(default_factory=dict)

    def with_mask_as_input(self) -> "Drawn":
        """Return the same step with the mask in the inputs instead of the plan."""
        scale = np.asarray(self.mask.scale, dtype=np.float32)
        plan = replace(self.plan, scale=None)
        return replace(self, plan=plan, inputs={**self.inputs, "scale": scale})


class Planner:
    """Draws the plan of each step.

    Args:
        config: the hyperparameters.
        units: the records of the trainable variables.
        perturbable: T booleans, whether a unit may be perturbed.
    """

    def __init__(
        self, config: ESAMConfig, units: Sequence[Unit], perturbable: Sequence[bool]
    ) -> None:
        self.config = config
        self.units = tuple(units)
        self.allowed = [p and config.rho > 0.0 for p in perturbable]
        listed = config.perturb.masks(self.units) if self.units else ()
        self._listed = None if listed is None else {mask.within(self.allowed) for mask in listed}
        #: Whether there are several listed masks that perturb something.
        self.masks_are_many = sum(mask.active for mask in self._listed or ()) > 1

    def subset_sizes(self, b: int) -> set[int]:
        """Return the sizes of the subsets of b samples on which the model runs."""
        config = self.config
        sizes = {selectors.subset_size(config.select.gamma, b)}
        if isinstance(config.ascend, Part):
            n = selectors.subset_size(config.ascend.share, b)
            sizes |= {n, b - n if selectors.needs_losses(config.select, b) else n}
        return sizes - {0} if config.uses_subsets else set()

    @property
    def needs_earlier(self) -> bool:
        """Whether the directions are those of earlier steps."""
        return isinstance(self.config.ascend, Previous | Momentum) and any(self.allowed)

    def draw(self, count: int, batch_size: int, *, compiled: bool, directed: bool = True) -> Drawn:
        """Return the plan of step `count` on a batch of this size.

        Args:
            count: >= 0.
            batch_size: b >= 1.
            compiled: whether the step is compiled for its plan. If not, each step gets its own
                plan, which costs nothing.
            directed: whether there is a direction. If not, the step is a base step.
        """
        config = self.config
        if not self.units:
            return Drawn(BASE, Mask((), ()), batch_size)
        mask = config.perturb.draw(self.units, seed=config.seed, count=count).within(self.allowed)
        if not directed:
            mask = mask.within([False] * len(self.units))
        if not mask.active:
            return Drawn(BASE, mask, batch_size)
        ascent, inputs = self._ascent(batch_size, count)
        if mask.weight_seed is not None:
            inputs["weight_seed"] = _two_words(mask.weight_seed)
        k = selectors.subset_size(config.select.gamma, batch_size)
        kept = "all" if k == batch_size else "one" if k == 1 else "some"
        if kept != "all":
            inputs.update(self._selection_inputs(batch_size, k, count))
        plan = Plan(True, mask.scale, mask.rho_factor, mask.weight_beta, kept, ascent)
        drawn = Drawn(plan, mask, batch_size, inputs)
        known = not compiled or self._is_listed(mask)
        return drawn if known else drawn.with_mask_as_input()

    def _ascent(self, b: int, count: int) -> tuple[Ascent, Inputs]:
        """Return the source of the direction, and the inputs of the step if it is a part."""
        ascend, select = self.config.ascend, self.config.select
        part = climbing_indices(ascend, b, seed=self.config.seed, count=count)
        if len(part) == b:
            return WHOLE, {}
        scores = selectors.needs_losses(select, b)
        records = records_at_theta(ascend, select, b)
        if not isinstance(ascend, Part):
            return Ascent("earlier", scores, records), {}
        inputs = {"part": part.astype(np.int32)}
        rest = np.setdiff1d(np.arange(b), part)
        if scores:
            inputs["rest"] = rest.astype(np.int32)
        return Ascent("part", scores, records, len(part) == 1, scores and len(rest) == 1), inputs

    def _is_listed(self, mask: Mask) -> bool:
        """Return whether the sampler lists this mask, so that it is worth compiling for."""
        return self._listed is not None and mask in self._listed

    def _selection_inputs(self, b: int, k: int, count: int) -> Inputs:
        """Return the random numbers from the host for the selection."""
        config = self.config
        if config.select.rule == "random":
            drawn = selectors.random_indices(b, k, seed=config.seed, count=count)
            return {"indices": drawn.astype(np.int32)}
        if config.select.rule == "proportional":
            offset = selectors.systematic_offset(seed=config.seed, count=count)
            return {"offset": _two_parts(offset)}
        return {}


def _two_parts(number: float) -> np.ndarray:
    """Return a number as a sum of two in float32: not every device has float64."""
    first = np.float32(number)
    return np.array([first, number - float(first)], dtype=np.float32)


def _two_words(seed: int) -> np.ndarray:
    """Return a seed in [0, 2**63) as two int32 words with the same bits."""
    return np.array([seed], dtype="<u8").view("<i4")
