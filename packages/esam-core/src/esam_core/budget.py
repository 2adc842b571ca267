"""Choose a sampler and a selector for a cost budget, using the cost model.

The rule: perturb the longest suffix that fits with all samples. If none fits, the descent pass uses
half of the samples, drawn in proportion to their loss and reweighted, so that its gradient equals
the batch gradient in expectation, and the suffix is the longest that fits then. In the study page
of the documentation, half of the samples are not more accurate than the base optimizer.

The user chooses the ascent direction (`ascend=`). It enters the cost of every option.

Two other ways to save were measured and left out, because they lose more accuracy than they save
time: perturbing only every n-th step, and keeping the samples with the largest loss or increase.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esam_core import validation
from esam_core.cost import WHOLE, step_cost
from esam_core.directions import Direction, Part
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

    @property
    def warning(self) -> str | None:
        """What the budget is too small for, and which budget is not; None if it is large enough.

        It should keep all samples, and perturb a quarter of what could be perturbed, which is half
        of the share in `Suffix(0.5)`.
        """
        keeping = [option for option in self.options if isinstance(option.select, All)]
        if self.chosen not in keeping:
            part = isinstance(self.ascend, Part)
            less = "" if part else "; with ascend=Part(0.25), less is enough"
            return (
                f"budget={self.budget:g} is too small to keep all samples, so the descent pass "
                "uses half of them, which was not more accurate than the base optimizer in our "
                f"study. All samples need at least {_least(keeping):.3f}{less}."
            )
        most = max(option.share for option in keeping)
        longer = [option for option in keeping if option.share >= most / 4.0]
        if self.chosen in longer:
            return None
        return (
            f"budget={self.budget:g} is only enough to perturb {100.0 * self.chosen.share:.2g} % "
            f"of the network (of its forward cost). A longer suffix needs at least "
            f"{_least(longer):.3f}: {min(longer, key=_ratio).perturb!r}."
        )

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
        >>> print(make_plan(units, 1.1, ascend=Part(0.25)).warning)
        budget=1.1 is only enough to perturb 8.3 % of the network (of its forward cost). A longer\
 suffix needs at least 1.122: Suffix(start='b9').
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
        cheapest = min(options, key=_ratio)
        raise ESAMValueError(
            f"`budget` must be at least {_least(options):.3f} for this model, the cost of "
            f"{cheapest.perturb!r} with {cheapest.select!r}. Received: budget={budget}."
        )
    chosen = max(fitting, key=lambda option: (isinstance(option.select, All), option.share))
    return Plan(budget, tuple(options), chosen, ascend)


def _ratio(option: Option) -> float:
    """Return the cost of a step in base steps."""
    return option.ratio


def _least(options: Sequence[Option]) -> float:
    """Return the cost of the cheapest option, rounded up: a budget of this number fits."""
    return math.ceil(min(map(_ratio, options)) * 1000.0 - 1e-7) / 1000.0


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
