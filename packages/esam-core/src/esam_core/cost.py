"""The cost model: what one step costs, given a sampler, a selector and an ascent direction.

Costs are in units of one forward pass of the whole model on the whole batch. A backward pass costs
two such units: one for the activation gradients and one for the weight gradients. The gradient of
the first layer's input is never computed. A base step therefore costs slightly less than 3 units
and a SAM step slightly less than 6. A step saves by skipping work in its passes:

- the forward and backward pass of the samples outside the ascent pass, with `Part`;
- the whole ascent pass, with `Previous` and `Momentum`;
- weight gradients of units that are not perturbed, in the ascent pass;
- activation gradients below the shallowest perturbed unit, in the ascent pass;
- the selection pass, if the selector does not need it;
- everything but a base step, if the mask is empty.

Every forward pass runs through the whole model. If a selector scores by losses at theta, the
samples outside the ascent pass need a forward pass for them.

Frozen units have no weight gradients in any pass, and a backward pass ends at the first trained
unit. This makes the base step cheaper too; every ratio is relative to that cheaper base step.

A unit's cost is the cost of the layer it belongs to. The model treats the network as a chain of
layers in the order of `depth`. Element-wise operations, optimizer updates and memory traffic count
as free. The results agree with FLOP counters, and roughly with measured times.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from esam_core import validation
from esam_core.directions import Batch, Direction, Part, check_direction
from esam_core.errors import ESAMValueError
from esam_core.perturbation import NORMS, Norm
from esam_core.samplers import Sampler, check_sampler
from esam_core.selectors import Selector, check_selector, subset_size
from esam_core.units import Mask, Unit

__all__ = ["StepCost", "base_cost", "expected_cost", "step_cost"]

#: The default direction.
WHOLE = Batch()


@dataclass(frozen=True)
class StepCost:
    """The parts of a step, in forward passes of the whole model on the whole batch.

    Args:
        ascent_forward: losses at theta of the samples in the ascent pass.
        ascent_activations: activation gradients in the ascent pass.
        ascent_weights: weight gradients in the ascent pass.
        scoring: losses at theta of the other samples, if the selector needs them.
        selection: losses at theta + epsilon.
        descent_forward: losses of the selected samples; the whole batch in a base step.
        descent_backward: their gradient.
        base: the cost of a base step.
    """

    ascent_forward: float
    ascent_activations: float
    ascent_weights: float
    scoring: float
    selection: float
    descent_forward: float
    descent_backward: float
    base: float

    @property
    def total(self) -> float:
        """The cost of the whole step."""
        ascent = self.ascent_forward + self.ascent_activations + self.ascent_weights
        descent = self.descent_forward + self.descent_backward
        return ascent + self.scoring + self.selection + descent

    @property
    def ratio(self) -> float:
        """The cost of the step divided by that of a base step."""
        return self.total / self.base


def _shares(units: Sequence[Unit]) -> tuple[list[Unit], list[float]]:
    """Return the units in order of execution and each one's share of the forward pass."""
    if not units:
        raise ESAMValueError("`units` must not be empty.")
    ordered = sorted(units, key=lambda unit: unit.depth)  # stable: listing order within a block
    total = sum(unit.cost for unit in ordered)
    if total <= 0.0:
        raise ESAMValueError("`units` must have a cost: all are 0. Take the units from a backend.")
    return ordered, [unit.cost / total for unit in ordered]


def _backward(units: Sequence[Unit], shares: Sequence[float], of: set[str]) -> tuple[float, float]:
    """Return the costs of activation gradients and of weight gradients, for the named units."""
    # The input of the first named unit needs no gradient. A unit without a cost of its own (a bias,
    # a norm) counts as a layer at its place: it needs the gradients of all layers after it.
    first = next(i for i, unit in enumerate(units) if unit.name in of)
    weights = sum(s for unit, s in zip(units, shares, strict=True) if unit.name in of)
    return sum(shares[first + 1 :]), weights


def base_cost(units: Sequence[Unit]) -> float:
    """Return the cost of a base step: slightly less than 3, and less again if units are frozen.

    Args:
        units: the model's units, with costs.

    Raises:
        ESAMValueError: no unit has a cost, or none is trained.

    Example:
        >>> base_cost([Unit(f"w{i}", (1,), cost=1.0, depth=i) for i in range(10)])
        2.9
    """
    ordered, shares = _shares(units)
    return 1.0 + sum(_backward(ordered, shares, _trained_names(units)))


def _trained_names(units: Sequence[Unit]) -> set[str]:
    """Return the names of the units that are trained."""
    names = {unit.name for unit in units if unit.trained}
    if not names:
        raise ESAMValueError("`units` must include a trained one: all are frozen.")
    return names


def step_cost(
    units: Sequence[Unit],
    mask: Mask,
    selector: Selector,
    *,
    batch_size: int | None = None,
    norm: Norm = "masked",
    ascend: Direction = WHOLE,
) -> StepCost:
    """Return the cost of one step with this mask.

    Args:
        units: the model's units, with costs, in the same order as in the mask.
        mask: which of them are perturbed.
        selector: which samples are kept.
        batch_size: b, to use the exact shares k / b and n / b; default: gamma and the part's share.
        norm: "full" needs a whole backward pass in the ascent.
        ascend: the ascent direction; default the whole batch.

    Raises:
        ESAMValueError, ESAMTypeError: an argument is invalid; the message names it.

    Example:
        >>> from esam_core import Suffix, TopIncrease
        >>> units = [Unit(f"w{i}", (1,), cost=1.0, block=str(i), depth=i) for i in range(300)]
        >>> mask = Suffix("200").draw(units, seed=0, count=0)
        >>> round(step_cost(units, mask, TopIncrease(0.5)).total, 1)  # 1 + 2 / 3 + 1 + 1.5
        4.2
    """
    check_selector("selector", selector)
    validation.choice("norm", norm, NORMS)
    check_direction("ascend", ascend)
    base = base_cost(units)
    mask = mask.within(unit.trained for unit in units)
    if not mask.active:
        return StepCost(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, base - 1.0, base)
    names = [unit.name for unit in units]
    if len(set(names)) != len(names):
        raise ESAMValueError("`units` must have unique names.")
    ordered, shares = _shares(units)
    perturbed = {unit.name for unit, m in zip(units, mask.perturbed, strict=True) if m}
    full = norm == "full"
    activations, weights = _backward(ordered, shares, _trained_names(units) if full else perturbed)
    gamma = _exact(selector.gamma, batch_size)
    climbs = _climbing(ascend, batch_size)
    selects = gamma < 1.0 and selector.score is not None
    return StepCost(
        ascent_forward=climbs,
        ascent_activations=climbs * activations,
        ascent_weights=climbs * weights,
        scoring=1.0 - climbs if selects else 0.0,
        selection=1.0 if selects and selector.score == "increase" else 0.0,
        descent_forward=gamma,
        descent_backward=gamma * (base - 1.0),
        base=base,
    )


def _climbing(ascend: Direction, batch_size: int | None) -> float:
    """Return the share of the batch in the ascent pass."""
    if isinstance(ascend, Part):
        return _exact(ascend.share, batch_size)
    return 1.0 if isinstance(ascend, Batch) else 0.0


def _exact(share: float, batch_size: int | None) -> float:
    """Return a share of the batch, rounded up to whole samples if the batch size is known."""
    return share if batch_size is None else subset_size(share, batch_size) / batch_size


def expected_cost(
    sampler: Sampler,
    units: Sequence[Unit],
    selector: Selector,
    *,
    batch_size: int | None = None,
    norm: Norm = "masked",
    ascend: Direction = WHOLE,
    start: int = 0,
    steps: int = 400,
    seed: int = 0,
) -> StepCost:
    """Return the mean cost of steps `start`, ..., `start + steps - 1` with a sampler.

    The result is exact for samplers with one mask, and for schedules over the given range of steps.
    For random masks it is the average over the masks that these steps draw.

    Args:
        sampler: any.
        units: the model's units, with costs.
        selector: any.
        batch_size: as in `step_cost`.
        norm: as in `step_cost`.
        ascend: as in `step_cost`. The first step of `Previous` and `Momentum`, which is a base
            step, is counted like the others.
        start: the first step, >= 0.
        steps: how many, >= 1. Default 400.
        seed: the seed of the masks.

    Raises:
        ESAMValueError, ESAMTypeError: an argument is invalid; the message names it.

    Example:
        >>> from esam_core import Bernoulli, Every, All, TopIncrease
        >>> units = [Unit(f"w{i}", (1,), cost=1.0, block=str(i), depth=i) for i in range(100)]
        >>> round(expected_cost(Bernoulli(0.6), units, TopIncrease(0.5)).ratio, 2)
        1.7
        >>> round(expected_cost(Every(10), units, All()).ratio, 6)
        1.1
    """
    check_sampler("sampler", sampler)
    validation.count_number("start", start)
    validation.count_number("steps", steps, least=1)
    known = sampler.masks(units)
    count = 1 if known is not None and len(known) == 1 else steps
    draws = Counter(
        sampler.draw(units, seed=seed, count=step) for step in range(start, start + count)
    )
    means = dict.fromkeys((spec.name for spec in fields(StepCost)), 0.0)
    for mask, times in draws.items():
        cost = step_cost(units, mask, selector, batch_size=batch_size, norm=norm, ascend=ascend)
        for name in means:
            means[name] += times / count * getattr(cost, name)
    return StepCost(**means)
