"""From a budget to a sampler and a selector, by the cost model.

The rules, in this order, each for a reason that the study page gives with its numbers:

1. The descent takes the whole batch (gamma = 1) as long as the budget is above a base step:
   taking the second gradient on half of the samples is what costs accuracy first.
2. The longest suffix that fits is perturbed in every step, if it is worth it: if it does at least
   a fifth of the forward's work.
3. Otherwise half of the network, by work, is perturbed on every n-th step only.
4. At or below the price of a base step something must be left out of the descent: the longest
   suffix that fits, with half of the samples, drawn in proportion to their loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esam_core import validation
from esam_core.cost import expected_cost
from esam_core.errors import ESAMValueError
from esam_core.sds import All, Proportional, Selector
from esam_core.swp import Every, Everything, Sampler, Suffix, Unit, block_order

__all__ = ["Option", "Plan", "make_plan"]

#: A suffix that does less than this share of the forward's work is not worth perturbing alone.
WORTHWHILE = 0.2


@dataclass(frozen=True)
class Option:
    """A sampler and a selector with their price.

    Args:
        perturb: the sampler.
        select: the selector.
        ratio: cost of a step, in base steps.
        share: share of the forward's work that the perturbed blocks do, in [0, 1].
    """

    perturb: Sampler
    select: Selector
    ratio: float
    share: float


@dataclass(frozen=True)
class Plan:
    """What a budget buys.

    Args:
        budget: the most that a step may cost, in base steps.
        options: what was considered, dearest first.
        chosen: one of them.
    """

    budget: float
    options: tuple[Option, ...]
    chosen: Option

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
        return "\n".join([f"budget: {self.budget:g} x the base optimizer's step", *lines])


def make_plan(units: Sequence[Unit], budget: float, *, norm: str = "masked") -> Plan:
    """Choose what a budget buys.

    Args:
        units: the model's units, with blocks and costs as measured.
        budget: the most that a step may cost on average, in base steps, > 0. SAM costs 2.
        norm: as for the optimizer; "full" forbids most savings.

    Raises:
        ESAMValueError: nothing fits; the message says what the cheapest option costs.

    Example:
        >>> units = [Unit(f"{i}", (1,), cost=1.0, block=f"b{i}", depth=i) for i in range(12)]
        >>> make_plan(units, 1.4).chosen.perturb
        Suffix(start='b7')
        >>> make_plan(units, 1.1).chosen.perturb
        Every(n=5, inner=Suffix(start='b6'))
    """
    budget = validation.positive("budget", budget)
    options = _options(units, budget, norm)
    fitting = [option for option in options if option.ratio <= budget * (1.0 + 1e-9)]
    if not fitting:
        cheapest = min(options, key=lambda option: option.ratio)
        raise ESAMValueError(
            f"`budget` must be at least {cheapest.ratio:.3f} for this model, the cost of "
            f"{cheapest.perturb!r} with {cheapest.select!r}. Received: budget={budget}."
        )
    every_step = [o for o in fitting if isinstance(o.select, All) and not _thinned(o)]
    thinned = [o for o in fitting if _thinned(o)]
    if every_step and (every_step[0].share >= WORTHWHILE or not thinned):
        chosen = every_step[0]  # the dearest: the longest suffix
    else:
        chosen = (thinned or fitting)[0]
    return Plan(budget, tuple(options), chosen)


def _thinned(option: Option) -> bool:
    """Say whether an option perturbs on some steps only."""
    return isinstance(option.perturb, Every)


def _options(units: Sequence[Unit], budget: float, norm: str) -> list[Option]:
    """Return what is worth considering, dearest first."""
    found = []
    for start in block_order(units):
        suffix: Sampler = Suffix(start) if start != block_order(units)[0] else Everything()
        found += [_priced(suffix, select, units, norm) for select in (All(), Proportional(0.5))]
    # Half of the network, thinned out until it fits.
    half = _priced(Suffix(_half(units)), All(), units, norm)
    if 1.0 < budget < half.ratio:
        every = Every(math.ceil((half.ratio - 1.0) / (budget - 1.0) - 1e-9), half.perturb)
        found.append(_priced(every, All(), units, norm))
    return sorted(found, key=lambda option: -option.ratio)


def _half(units: Sequence[Unit]) -> str:
    """Return the block at which the longest suffix of at most half of the work begins."""
    mask = Suffix(0.5).draw(units, seed=0, count=0)
    inside = {unit.block for unit, m in zip(units, mask.perturbed, strict=True) if m}
    return next(block for block in block_order(units) if block in inside)


def _priced(perturb: Sampler, select: Selector, units: Sequence[Unit], norm: str) -> Option:
    """Return an option with its cost and the share of the work that it perturbs."""
    steps = perturb.n if isinstance(perturb, Every) else 1
    cost = expected_cost(perturb, units, select, norm=norm, steps=steps)
    mask = perturb.draw(units, seed=0, count=0)
    total = sum(unit.cost for unit in units)
    touched = sum(unit.cost for unit, m in zip(units, mask.perturbed, strict=True) if m)
    return Option(perturb, select, cost.ratio, touched / total)
