"""Stochastic weight perturbation (SWP): which units are perturbed in a step.

A *sampler* maps (units, seed, count) to a `Mask`, and does so as a pure function: nothing is
stored, so the masks of a resumed run are those of the run that was cut off, on every platform,
backend and rank. `schedules` holds the samplers that say when to perturb.

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
from esam_core.units import KINDS, Mask, Unit, block_order, kept_for_units

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

# The grid of single-precision uniform draws. With a smaller beta, backends that draw each weight
# on its own would still hit one in 2**23, and 1/beta soon leaves float32: inf times a weight that
# was not drawn is not a number.
_LEAST_BETA = 2.0**-23


@runtime_checkable
class Sampler(Protocol):
    """What `perturb=` takes. Implement it to bring a sampler of your own."""

    @property
    def needs_blocks(self) -> bool:
        """Whether `draw` looks at `Unit.block`, `cost` or `depth`, and not just at names."""
        ...

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        """Return the mask of ascent number `count`: a pure function of its arguments."""
        ...

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        """Return every mask that `draw` can return where they are few enough to list, or None.

        Backends that compile make one function for each listed mask.
        """
        ...


@dataclass(frozen=True)
class Bernoulli:
    """Perturb each unit on its own with probability beta: the paper's SWP, and the default.

    The inclusion probability is beta, also for the rare draw that is empty. `unit="weight"`
    draws each scalar weight on its own (equation 6 as printed), which saves no time;
    `unit="tensor"` is what the authors' code does and what appendix A.4 argues for.

    Args:
        beta: in (0, 1], and at least 2**-23 (1.2e-07), the finest that backends can draw.
            Default 0.6, the paper's for ResNet-18.
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
                "`beta` must be at least 2**-23 (1.2e-07), the finest that backends can draw. "
                f"Received: beta={self.beta!r}."
            )
        validation.choice("unit", self.unit, ("tensor", "weight"))

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
    by_block = dict.fromkeys(blocks, 0.0)
    for unit in units:
        by_block[unit.block] += unit.cost
    costs = list(by_block.values())
    total = sum(costs)
    if total == 0.0:
        raise ESAMValueError(
            f"`start` as a share needs units with a known cost, and all are 0. "
            f"Received: start={start!r}. Name a block instead: {', '.join(map(repr, blocks))}."
        )
    # The longest suffix that costs no more than the share asked for, and at least one block. The
    # slack absorbs the rounding of the sum: a share computed from these costs keeps its block.
    cut = len(blocks) - 1
    while cut > 0 and sum(costs[cut - 1 :]) <= start * total * (1.0 + 1e-9):
        cut -= 1
    return cut


def _check_start(start: Any) -> str | float:
    """Return a block's name or a share in (0, 1]."""
    if isinstance(start, str):
        if not start:
            raise ESAMValueError("`start` must be a block's name or in (0, 1]. Received: start=''.")
        return start
    return validation.open_unit("start", start)


@kept_for_units
def _in_suffix(start: str | float, units: Sequence[Unit]) -> tuple[bool, ...]:
    """Return for each unit whether its block is the first of the suffix or behind it."""
    cut = _cut(start, units)
    place = {block: index for index, block in enumerate(block_order(units))}
    return tuple(place[unit.block] >= cut for unit in units)


@dataclass(frozen=True)
class Suffix:
    """Perturb the blocks from `start` to the output, always the same ones (p = 1).

    Back-propagation of the ascent pass stops at the cut: with a suffix of share s and half of the
    samples in the descent a step costs (1 + 2 s + 1.5) / 3 base steps, and one third more where
    the selector needs the selection pass.

    Args:
        start: the name of a block ("layer3"; a name before a dot names all inside it), or a share
            of the forward cost in (0, 1]: the longest suffix that costs no more, and at least the
            last block.

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
    """Perturb one of several suffixes, drawn anew for each step.

    A unit's inclusion probability is the summed probability of the suffixes that hold it, so
    units near the output are perturbed often and little, deep ones seldom and much.

    Args:
        starts: one or more starts, each as in `Suffix`.
        probabilities: as many numbers in (0, 1] that add up to 1; default equal.

    Example:
        >>> units = [Unit("a", (2,), block="stem"), Unit("b", (2,), block="head")]
        >>> RandomSuffix(("stem", "head"), (0.25, 0.75)).draw(units, seed=0, count=0).probability
        (0.25, 1.0)
    """

    starts: tuple[str | float, ...]
    probabilities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.starts, str) or not isinstance(self.starts, Sequence) or not self.starts:
            raise ESAMTypeError(
                "`starts` must be a non-empty sequence of block names or shares. "
                f"Received: starts={self.starts!r}."
            )
        if isinstance(self.probabilities, str) or not isinstance(self.probabilities, Iterable):
            raise ESAMTypeError(
                "`probabilities` must be a sequence of numbers in (0, 1], one a start, or () for "
                f"equal ones. Received: probabilities={self.probabilities!r}."
            )
        starts = tuple(_check_start(start) for start in self.starts)
        given = tuple(self.probabilities) or (1.0 / len(starts),) * len(starts)
        probabilities = tuple(validation.open_unit("probabilities", p) for p in given)
        if len(probabilities) != len(starts) or abs(sum(probabilities) - 1.0) > 1e-9:
            raise ESAMValueError(
                f"`probabilities` must be {len(starts)} numbers (one a start) that add up to 1. "
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


@kept_for_units
def _suffix_masks(sampler: RandomSuffix, units: Sequence[Unit]) -> tuple[Mask, ...]:
    """Return the masks of a `RandomSuffix`, one for each start."""
    suffixes = [_in_suffix(start, units) for start in sampler.starts]
    probability = tuple(
        # Rounding may leave a hair over 1 where every suffix holds the unit.
        min(1.0, sum(p for p, s in zip(sampler.probabilities, suffixes, strict=True) if s[t]))
        for t in range(len(units))
    )
    return tuple(Mask(suffix, probability) for suffix in suffixes)


@dataclass(frozen=True)
class Only:
    """Perturb, of what `inner` perturbs, only one kind of unit.

    `Only("norm")` is SAM-ON (Mueller et al. 2023): normalisation layers alone.

    Args:
        kind: one of `KINDS`, or a pattern over names with the wildcards of `fnmatch`
            ("*.attention.*"), or a function of a `Unit` that returns a bool. A pattern must match
            a unit of the model; of a kind there may be none, and steps are then base steps.
        inner: any sampler; default `Everything()`. Its inclusion probabilities are kept.

    Raises:
        ESAMValueError: when masks are drawn or listed, if the text is no kind and matches nothing.

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


@kept_for_units
def _of_kind(kind: str | Callable[[Unit], bool], units: Sequence[Unit]) -> list[bool]:
    """Return for each unit whether it is of a kind."""
    if callable(kind):
        return [bool(kind(unit)) for unit in units]
    if kind in KINDS:
        return [unit.kind == kind for unit in units]
    allowed = [fnmatch.fnmatchcase(unit.name, kind) for unit in units]
    if not any(allowed):  # most likely misspelt, and every step would silently be a base step
        named = f", such as {units[0].name!r}" if units else ""
        raise ESAMValueError(
            f"`kind` must be one of {', '.join(map(repr, KINDS))}, or a pattern that matches "
            f"the name of a unit{named}. Received: kind={kind!r}."
        )
    return allowed


def distinct(masks: Iterable[Mask]) -> tuple[Mask, ...]:
    """Return the masks in order, each once."""
    return tuple(dict.fromkeys(masks))


def check_sampler(name: str, value: Any) -> Sampler:
    """Return `value` if it is a sampler, and not its class."""
    if isinstance(value, type) or not isinstance(value, Sampler):
        raise ESAMTypeError(
            f"`{name}` must be a sampler such as Bernoulli(0.6) or Suffix('layer3'). "
            f"Received: {name}={value!r}."
        )
    return value
