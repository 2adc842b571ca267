"""Choose a sampler and a selector for a cost budget, using the cost model.

The rule: keep all samples if the budget also covers half of the network, and perturb the longest
suffix that fits. Otherwise the descent pass uses half of the samples, drawn in proportion to their
loss and reweighted, so that its gradient equals the batch gradient in expectation, and the suffix
is the longest that fits then. The study page of the documentation has the measurements behind this
rule.

The user chooses the ascent direction (`ascend=`). It enters the cost of every option.

Two other ways to save were measured and left out, because they lose more accuracy than they save
time: perturbing only every n-th step, and keeping the samples with the largest loss or increase.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esam_core import validation
from esam_core.cost import WHOLE, step_cost
from esam_core.directions import Direction
from esam_core.errors import ESAMValueError
from esam_core.perturbation import Norm
from esam_core.samplers import Everything, Sampler, Suffix
from esam_core.selectors import All, Proportional, Selector
from esam_core.units import Unit, block_order

__all__ = ["Option", "Plan", "make_plan"]


@dataclass(frozen=True)
class Option:
    """A sampler and a selector with their cost.

    Args:
        perturb: the sampler.
        select: the selector.
        ratio: cost of a step, in base steps.
        share: share of the forward cost that is in the perturbed blocks, in [0, 1].
    """

    perturb: Sampler
    select: Selector
    ratio: float
    share: float


@dataclass(frozen=True)
class Plan:
    """The options considered for a budget, and the chosen one.

    Args:
        budget: the most that a step may cost, in base steps.
        options: all options considered, most expensive first.
        chosen: the chosen option.
        ascend: the ascent direction.
    """

    budget: float
    options: tuple[Option, ...]
    chosen: Option
    ascend: Direction = WHOLE

    def __str__(self) -> str:
        """Return a table of the options; an arrow marks the choice."""
        rows = [("", "cost", "share", "perturb", "select")]
        rows += [
            (
                "->" if option == self.chosen else "",
                f"{option.ratio:.3f}",
                f"{option.share:.0%}",
                repr(option.perturb),
                repr(option.select),
            )
            for option in self.options
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row[:4], widths, strict=True)), row[4]])
            for row in rows
        ]
        ascend = "" if self.ascend == WHOLE else f", ascend={self.ascend!r}"
        return "\n".join([f"budget: {self.budget:g} x the base optimizer's step{ascend}", *lines])


def make_plan(
    units: Sequence[Unit],
    budget: float,
    *,
    norm: Norm = "masked",
    perturbable: Sequence[bool] | None = None,
    ascend: Direction = WHOLE,
) -> Plan:
    """Choose a sampler and a selector that fit a budget.

    Args:
        units: the model's units, with blocks and costs as measured.
        budget: the most that a step may cost on average, in base steps, > 0. SAM costs 2.
        norm: as for the optimizer; "full" forbids most savings.
        perturbable: for each unit, whether it may be perturbed if it is trained; None (default):
            all may be.
        ascend: the ascent direction; default the whole batch.

    Raises:
        ESAMValueError: no unit may be perturbed, `perturbable` has another length than `units`, or
            no option fits the budget; the message gives the cost of the cheapest option.

    Example:
        >>> units = [Unit(f"{i}", (1,), cost=1.0, block=f"b{i}", depth=i) for i in range(12)]
        >>> make_plan(units, 1.1).chosen.perturb
        Suffix(start='b7')
        >>> make_plan(units, 1.1).chosen.select
        Proportional(gamma=0.5, score='loss', floor=1.0)
        >>> make_plan(units, 2.0).chosen.perturb, make_plan(units, 2.0).chosen.select
        (Everything(), All())
        >>> from esam_core import Part
        >>> choice = make_plan(units, 1.2, ascend=Part(0.25)).chosen
        >>> choice.perturb, choice.select
        (Suffix(start='b4'), All())
    """
    budget = validation.positive("budget", budget)
    may = [True] * len(units) if perturbable is None else list(perturbable)
    if len(may) != len(units):
        raise ESAMValueError(
            f"`perturbable` must be {len(units)} booleans, one per unit. "
            f"Received: perturbable={perturbable!r}."
        )
    allowed = [unit.trained and bool(m) for unit, m in zip(units, may, strict=True)]
    if not any(allowed):
        raise ESAMValueError("`units` must include a perturbable one. Received: none.")
    options = _options(units, allowed, norm, ascend)
    fitting = [option for option in options if option.ratio <= budget * (1.0 + 1e-9)]
    if not fitting:
        cheapest = min(options, key=lambda option: option.ratio)
        least = math.ceil(cheapest.ratio * 1000.0 - 1e-7) / 1000.0  # up: the named budget fits
        raise ESAMValueError(
            f"`budget` must be at least {least:.3f} for this model, the cost of "
            f"{cheapest.perturb!r} with {cheapest.select!r}. Received: budget={budget}."
        )
    half = max(option.share for option in options) / 2.0

    def worth(option: Option) -> tuple[bool, float, bool]:
        keeps_all = isinstance(option.select, All)
        return keeps_all and option.share >= half, option.share, keeps_all

    return Plan(budget, tuple(options), max(fitting, key=worth), ascend)


def _options(
    units: Sequence[Unit], allowed: Sequence[bool], norm: Norm, ascend: Direction
) -> list[Option]:
    """Return all options to consider, most expensive first."""
    # A suffix that starts at a block without perturbable units equals the suffix of the next block.
    reached = {unit.block for unit, may in zip(units, allowed, strict=True) if may}
    starts = [block for block in block_order(units) if block in reached]
    found = [
        _make_option(
            Everything() if start == starts[0] else Suffix(start),
            select,
            units,
            allowed,
            norm,
            ascend,
        )
        for start in starts
        for select in (All(), Proportional(0.5))
    ]
    return sorted(found, key=lambda option: -option.ratio)


def _make_option(
    perturb: Sampler,
    select: Selector,
    units: Sequence[Unit],
    allowed: Sequence[bool],
    norm: Norm,
    ascend: Direction,
) -> Option:
    """Return an option with its cost and the share of the forward cost that it perturbs."""
    mask = perturb.draw(units, seed=0, count=0).within(allowed)
    cost = step_cost(units, mask, select, norm=norm, ascend=ascend)
    total = sum(unit.cost for unit in units)
    touched = sum(unit.cost for unit, m in zip(units, mask.perturbed, strict=True) if m)
    return Option(perturb, select, cost.ratio, touched / total)
