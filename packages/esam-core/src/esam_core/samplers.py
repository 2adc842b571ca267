"""Stochastic weight perturbation (SWP): which units are perturbed in a step.

A *sampler* is a pure function from (units, seed, count) to a `Mask`. It stores no state, so a
resumed run draws the same masks as the interrupted one would have, on every platform, backend and
rank. The module `schedules` has the samplers that decide when to perturb.

Source: Du et al., ICLR 2022 (arXiv 2110.03141), section 3.2, equation 6 and appendix A.4.
"""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from esam_core import validation
from esam_core.draws import derived_seed, uniforms
from esam_core.errors import ESAMTypeError, ESAMValueError
from esam_core.units import KINDS, Mask, Unit, block_order, cache_for_units

__all__ = [
    "Bernoulli",
    "Everything",
    "Only",
    "RandomSuffix",
    "Sampler",
    "Suffix",
    "check_sampler",
    "distinct",
]

# The resolution of single-precision uniform draws. With a smaller beta, backends that draw each
# weight individually would still select one in 2**23. In addition, 1/beta would soon overflow
# float32, and inf times the 0 of a weight that was not drawn is NaN.
_LEAST_BETA = 2.0**-23


@runtime_checkable
class Sampler(Protocol):
    """The type of `perturb=`. Implement it to write your own sampler."""

    @property
    def needs_blocks(self) -> bool:
        """Whether `draw` uses `Unit.block`, `cost` or `depth`, and not only names."""
        ...

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        """Return the mask of step `count`. This must be a pure function of its arguments."""
        ...

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        """Return all masks that `draw` can return, or None if there are too many to list.

        Backends that compile create one function for each listed mask.
        """
        ...


@dataclass(frozen=True)
class Bernoulli:
    """Perturb each unit independently with probability beta: the paper's SWP. The default.

    The inclusion probability is beta; the rare draws without any unit are allowed. `unit="weight"`
    draws each scalar weight independently (equation 6 as printed), which saves no time.
    `unit="tensor"` follows the authors' code and appendix A.4.

    Args:
        beta: in (0, 1], and at least 2**-23 (1.2e-07), the smallest that backends can draw. Default
            0.6, the paper's for ResNet-18.
        unit: "tensor" (default) or "weight".

    Example:
        >>> units = [Unit(f"w{i}", (3,)) for i in range(4)]
        >>> Bernoulli(1.0).draw(units, seed=0, count=0).perturbed
        (True, True, True, True)
    """

    beta: float = 0.6
    unit: str = "tensor"

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", validation.open_unit("beta", self.beta))
        if self.beta < _LEAST_BETA:
            raise ESAMValueError(
                "`beta` must be at least 2**-23 (1.2e-07), the smallest that backends can draw. "
                f"Received: beta={self.beta!r}."
            )
        unit = validation.choice("unit", self.unit, ("tensor", "weight"))
        object.__setattr__(self, "unit", unit)

    @property
    def needs_blocks(self) -> bool:
        return False

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        probability = (self.beta,) * len(units)
        if self.unit == "weight" and self.beta < 1.0:
            weight_seed = derived_seed(seed=seed, count=count, stream=stream)
            return Mask((True,) * len(units), probability, self.beta, weight_seed)
        drawn = uniforms(len(units), seed=seed, count=count, stream=stream) < self.beta
        return Mask(tuple(drawn.tolist()), probability)

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        return Everything().masks(units) if self.beta == 1.0 else None


@dataclass(frozen=True)
class Everything:
    """Perturb every unit: SAM (Foret et al. 2021).

    Example:
        >>> Everything().draw([Unit("w", (2,))], seed=0, count=0).perturbed
        (True,)
    """

    @property
    def needs_blocks(self) -> bool:
        return False

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        return Mask((True,) * len(units), (1.0,) * len(units))

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        return (self.draw(units, seed=0, count=0),)


def _cut(start: str | float, units: Sequence[Unit]) -> int:
    """Return the index in `block_order` of the first block of the suffix."""
    blocks = block_order(units)
    if isinstance(start, str):
        for index, block in enumerate(blocks):
            if block == start or block.startswith(start + "."):
                return index
        raise ESAMValueError(
            f"`start` must name a block of the model, one of {', '.join(map(repr, blocks))}. "
            f"Received: start={start!r}."
        )
    if len(blocks) == 1:
        return 0
    by_block = dict.fromkeys(blocks, 0.0)
    for unit in units:
        by_block[unit.block] += unit.cost
    costs = list(by_block.values())
    total = sum(costs)
    if total == 0.0:
        raise ESAMValueError(
            "`start` as a share needs units with a known cost, but all costs are 0. "
            f"Received: start={start!r}. Name a block instead: {', '.join(map(repr, blocks))}."
        )
    # The longest suffix that costs no more than the given share, and at least one block. The
    # tolerance absorbs rounding in the sum: a share computed from these costs keeps its block.
    cut = len(blocks) - 1
    while cut > 0 and sum(costs[cut - 1 :]) <= start * total * (1.0 + 1e-9):
        cut -= 1
    return cut


def _check_start(start: Any) -> str | float:
    """Return a block's name or a share in (0, 1]."""
    if isinstance(start, str):
        if not start:
            raise ESAMValueError("`start` must be a block's name or in (0, 1]. Received: start=''.")
        return str(start)  # NumPy's strings too
    return validation.open_unit("start", start)


@cache_for_units
def _in_suffix(start: str | float, units: Sequence[Unit]) -> tuple[bool, ...]:
    """Return, for each unit, whether its block is in the suffix."""
    cut = _cut(start, units)
    place = {block: index for index, block in enumerate(block_order(units))}
    return tuple(place[unit.block] >= cut for unit in units)


@dataclass(frozen=True)
class Suffix:
    """Perturb all blocks from `start` to the output, in every step (p = 1).

    Back-propagation in the ascent pass stops at the cut. With a suffix of share s and an ascent on
    a share p of the batch (`ascend=Part(p)`), a step costs 1 + p (1 + 2 s) / 3 base steps. In an
    optimizer: `ESAM(base, model, perturb=Suffix(0.5), gamma=1.0, ascend=Part(0.25))`.

    Args:
        start: the name of a block ("layer3"; a name before a dot includes all blocks inside it), or
            a share of the forward cost in (0, 1]: the longest suffix that costs no more, and at
            least the last block. Blocks are not divided, so it may cost far less; optimizers warn
            if it is less than half of the share.

    Example:
        >>> units = [Unit("a", (2,), block="stem"), Unit("b", (2,), block="head")]
        >>> Suffix("head").draw(units, seed=0, count=0).perturbed
        (False, True)
    """

    start: str | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _check_start(self.start))

    @property
    def needs_blocks(self) -> bool:
        return True

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        return Mask(_in_suffix(self.start, units), (1.0,) * len(units))

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        return (self.draw(units, seed=0, count=0),)


@dataclass(frozen=True)
class RandomSuffix:
    """Perturb one of several suffixes, drawn at random in each step.

    A unit's inclusion probability is the sum of the probabilities of the suffixes that contain it.
    Units near the output are therefore perturbed often and slightly, units near the input rarely
    and strongly.

    Args:
        starts: one or more starts, each as in `Suffix`.
        probabilities: one number in (0, 1] for each start; they add up to 1. Default: equal.

    Example:
        >>> units = [Unit("a", (2,), block="stem"), Unit("b", (2,), block="head")]
        >>> RandomSuffix(("stem", "head"), (0.25, 0.75)).draw(units, seed=0, count=0).probability
        (0.25, 1.0)
    """

    starts: tuple[str | float, ...]
    probabilities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        must = "a non-empty sequence of block names or shares"
        listed = validation.sequence("starts", self.starts, must)
        if not listed:
            raise ESAMValueError(f"`starts` must be {must}. Received: starts={self.starts!r}.")
        starts = tuple(_check_start(start) for start in listed)
        must = "a sequence of numbers in (0, 1], one per start, or () for equal ones"
        given = validation.sequence("probabilities", self.probabilities, must)
        given = given or [1.0 / len(starts)] * len(starts)
        probabilities = tuple(validation.open_unit("probabilities", p) for p in given)
        if len(probabilities) != len(starts) or abs(sum(probabilities) - 1.0) > 1e-9:
            raise ESAMValueError(
                f"`probabilities` must be {len(starts)} numbers (one per start) that add up to 1. "
                f"Received: probabilities={self.probabilities!r}."
            )
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "probabilities", probabilities)

    @property
    def needs_blocks(self) -> bool:
        return True

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        (u,) = uniforms(1, seed=seed, count=count, stream=stream)
        bounds = np.cumsum(self.probabilities)
        chosen = min(int(np.searchsorted(bounds, u, side="right")), len(self.starts) - 1)
        return self.masks(units)[chosen]

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...]:
        return _suffix_masks(self, units)


@cache_for_units
def _suffix_masks(sampler: RandomSuffix, units: Sequence[Unit]) -> tuple[Mask, ...]:
    """Return the masks of a `RandomSuffix`, one for each start."""
    suffixes = [_in_suffix(start, units) for start in sampler.starts]
    drawn = list(zip(sampler.probabilities, suffixes, strict=True))
    probability = tuple(
        # Rounding may give slightly more than 1 if every suffix contains the unit.
        min(1.0, sum((p for p, suffix in drawn if suffix[t]), 0.0))
        for t in range(len(units))
    )
    return tuple(Mask(suffix, probability) for suffix in suffixes)


@dataclass(frozen=True)
class Only:
    """Perturb only one kind of unit, out of those that `inner` perturbs.

    `Only("norm")` is SAM-ON (Mueller et al. 2023): only normalisation layers.

    Args:
        kind: one of `KINDS`, or a pattern over names with the wildcards of `fnmatch`
            ("*.attention.*"), or a function of a `Unit` that returns a bool. A pattern must match
            at least one unit of the model. A kind may match none: all steps are then base steps,
            and a warning says so.
        inner: any sampler; default `Everything()`. Its inclusion probabilities are kept.

    Raises:
        ESAMValueError: when masks are drawn or listed, if the string is not a kind and matches no
            unit.

    Example:
        >>> units = [Unit("conv.weight", (3,)), Unit("bn.weight", (3,), kind="norm")]
        >>> Only("norm").draw(units, seed=0, count=0).perturbed
        (False, True)
    """

    kind: str | Callable[[Unit], bool]
    inner: Sampler = field(default_factory=Everything)

    def __post_init__(self) -> None:
        if not (callable(self.kind) or (isinstance(self.kind, str) and self.kind)):
            raise ESAMTypeError(
                f"`kind` must be one of {', '.join(map(repr, KINDS))}, a name pattern or a "
                f"function of a Unit. Received: kind={self.kind!r}."
            )
        if isinstance(self.kind, str):
            object.__setattr__(self, "kind", str(self.kind))  # torch does not load NumPy's
        check_sampler("inner", self.inner)

    @property
    def needs_blocks(self) -> bool:
        return callable(self.kind) or self.inner.needs_blocks

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        mask = self.inner.draw(units, seed=seed, count=count, stream=stream)
        return mask.within(_of_kind(self.kind, units))

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        allowed = _of_kind(self.kind, units)
        inner = self.inner.masks(units)
        return None if inner is None else distinct(mask.within(allowed) for mask in inner)


@cache_for_units
def _of_kind(kind: str | Callable[[Unit], bool], units: Sequence[Unit]) -> list[bool]:
    """Return, for each unit, whether it is of a kind."""
    if callable(kind):
        return [bool(kind(unit)) for unit in units]
    if kind in KINDS:
        return [unit.kind == kind for unit in units]
    allowed = [fnmatch.fnmatchcase(unit.name, kind) for unit in units]
    if not any(allowed):  # probably a typo; every step would silently be a base step
        named = f", such as {units[0].name!r}" if units else ""
        raise ESAMValueError(
            f"`kind` must be one of {', '.join(map(repr, KINDS))}, or a pattern that matches "
            f"the name of a unit{named}. Received: kind={kind!r}."
        )
    return allowed


def distinct(masks: Iterable[Mask]) -> tuple[Mask, ...]:
    """Return the masks in order, without duplicates."""
    return tuple(dict.fromkeys(masks))


def check_sampler(name: str, value: Any) -> Sampler:
    """Return `value` if it is a sampler instance."""
    if isinstance(value, type) or not isinstance(value, Sampler):
        raise ESAMTypeError(
            f"`{name}` must be a sampler such as Bernoulli(0.6) or Suffix('layer3'). "
            f"Received: {name}={value!r}."
        )
    return value
