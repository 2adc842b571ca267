"""What a sampler can perturb in a given model, and warnings if that is not what was asked for."""

from collections.abc import Iterator, Sequence

from esam_core.samplers import Only, RandomSuffix, Sampler, Suffix
from esam_core.schedules import Between, Every, Sometimes
from esam_core.units import Unit, block_order

__all__ = ["reach_warning", "reachable", "uses_costs", "why_idle", "why_short"]

#: A suffix is too short if its share of the forward cost is below this part of the share asked for.
_SHORT = 0.5


def reach_warning(sampler: Sampler, units: Sequence[Unit], allowed: Sequence[bool]) -> str | None:
    """Return the warning of `why_idle` or of `why_short`, or None.

    Args:
        sampler: any.
        units: T records, at least one.
        allowed: T booleans, whether the unit is trained and may be perturbed.
    """
    return why_idle(sampler, units, allowed) or why_short(sampler, units, allowed)


def reachable(sampler: Sampler, units: Sequence[Unit], allowed: Sequence[bool]) -> tuple[bool, ...]:
    """Return, for each unit, whether a mask of the sampler may perturb it.

    Args:
        sampler: any. If it cannot list its masks, it may perturb every unit that is allowed.
        units: T records.
        allowed: T booleans, whether the unit may be perturbed.

    Example:
        >>> units = [Unit("a", (2,), block="stem"), Unit("b", (2,), block="head")]
        >>> reachable(Suffix("head"), units, [True, True])
        (False, True)
    """
    masks = sampler.masks(units)
    if masks is None:
        return tuple(map(bool, allowed))
    return tuple(bool(may) and any(m.perturbed[t] for m in masks) for t, may in enumerate(allowed))


def why_idle(sampler: Sampler, units: Sequence[Unit], allowed: Sequence[bool]) -> str | None:
    """Return a warning if the sampler never perturbs anything, else None.

    Args:
        sampler: any.
        units: T records, at least one.
        allowed: T booleans, whether the unit is trained and may be perturbed.

    Example:
        >>> from esam_core import Only
        >>> print(why_idle(Only("norm"), [Unit("w", (2,))], [True]))
        perturb=Only(kind='norm', inner=Everything()) reaches none of the weights that are trained\
 and may be perturbed: all steps are base steps so far. The kinds of these weights: weight.
    """
    if any(reachable(sampler, units, allowed)):
        return None
    kinds = dict.fromkeys(unit.kind for unit, may in zip(units, allowed, strict=True) if may)
    if not kinds:
        return "No weights are trained and may be perturbed: all steps are base steps so far."
    return (
        f"perturb={sampler!r} reaches none of the weights that are trained and may be perturbed: "
        f"all steps are base steps so far. The kinds of these weights: {', '.join(kinds)}."
    )


def why_short(sampler: Sampler, units: Sequence[Unit], allowed: Sequence[bool]) -> str | None:
    """Return a warning if a suffix has less than half of the share that was asked for, else None.

    Blocks are not divided, so a suffix is short if the block before it is large. There is no
    warning if the suffix already contains everything that may be perturbed.

    Args:
        sampler: any; only suffixes with a share as their start are looked at.
        units: T records, at least one.
        allowed: T booleans, whether the unit is trained and may be perturbed.

    Example:
        >>> units = [Unit("a", (2,), block="stem", cost=9.0), Unit("b", (2,), block="head", cost=1)]
        >>> print(why_short(Suffix(0.5), units, [True, True]))
        perturb=Suffix(start=0.5) perturbs only 10 % of the network (of its forward cost), from\
 'head' on, because the block before it, 'stem', is not divided. Suffix('stem') perturbs 100 %.
    """
    for start in _shares(sampler):
        perturbed = Suffix(start).draw(units, seed=0, count=0).perturbed
        total = sum(unit.cost for unit in units) or 1.0
        reach = sum(u.cost for u, p in zip(units, perturbed, strict=True) if p) / total
        blocks = block_order(units)
        inside = {unit.block for unit, p in zip(units, perturbed, strict=True) if p}
        may = [unit for unit, a in zip(units, allowed, strict=True) if a]
        outside = {unit.block for unit in may} - inside
        if reach >= _SHORT * start or not outside:
            continue
        first = next(block for block in blocks if block in inside)
        before = blocks[blocks.index(first) - 1]
        other = next(block for block in reversed(blocks) if block in outside)
        share = sum(unit.cost for unit in may if unit.block in inside) / total
        longer = sum(u.cost for u in may if blocks.index(u.block) >= blocks.index(other)) / total
        return (
            f"perturb={sampler!r} perturbs only {100.0 * share:.2g} % of the network (of its "
            f"forward cost), from {first!r} on, because the block before it, {before!r}, is not "
            f"divided. Suffix({other!r}) perturbs {100.0 * longer:.3g} %."
        )
    return None


def uses_costs(sampler: Sampler) -> bool:
    """Return whether a sampler's masks may depend on the units' costs.

    Args:
        sampler: any. One of your own may, if it needs blocks.

    Example:
        >>> uses_costs(Suffix(0.5)), uses_costs(Suffix("head"))
        (True, False)
    """
    if isinstance(sampler, Suffix | RandomSuffix):
        return any(True for _ in _shares(sampler))
    if isinstance(sampler, Only) and not callable(sampler.kind):
        return uses_costs(sampler.inner)
    if isinstance(sampler, Every | Between | Sometimes):
        return uses_costs(sampler.inner)
    return sampler.needs_blocks


def _shares(sampler: Sampler) -> Iterator[float]:
    """Yield the shares from which a sampler, or one inside it, computes its suffixes."""
    if isinstance(sampler, Suffix | RandomSuffix):
        starts = (sampler.start,) if isinstance(sampler, Suffix) else sampler.starts
        yield from (start for start in starts if not isinstance(start, str))
    inner = getattr(sampler, "inner", None)
    if inner is not None:
        yield from _shares(inner)
