"""Samplers that say when to perturb: every n-th step, between two steps, sometimes.

Source: `Every` is Composer's `interval`; `Between` is late-phase SAM (Zhou et al. 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from esam_core import validation
from esam_core.draws import uniforms
from esam_core.samplers import Everything, Sampler, check_sampler, distinct
from esam_core.units import Mask, Unit

__all__ = ["Between", "Every", "Sometimes"]


def _empty(units: Sequence[Unit]) -> Mask:
    """Return the mask of a step that perturbs nothing."""
    return Mask((False,) * len(units), (1.0,) * len(units))


def _with_empty(inner: tuple[Mask, ...] | None, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
    """Return the inner masks and the empty one, or None where those are too many."""
    return None if inner is None else distinct((*inner, _empty(units)))


@dataclass(frozen=True)
class Every:
    """Perturb on every n-th ascent (0, n, 2n, ...), and take base steps between them.

    A schedule: the inclusion probabilities stay the inner sampler's.

    Args:
        n: >= 1.
        inner: any sampler; default `Everything()`.

    Example:
        >>> [Every(2).draw([Unit("w", (1,))], seed=0, count=c).active for c in range(4)]
        [True, False, True, False]
    """

    n: int
    inner: Sampler = field(default_factory=Everything)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", validation.count_number("n", self.n, least=1))
        check_sampler("inner", self.inner)

    @property
    def needs_blocks(self) -> bool:
        return self.inner.needs_blocks

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        if count % self.n:
            return _empty(units)
        return self.inner.draw(units, seed=seed, count=count, stream=stream)

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        inner = self.inner.masks(units)
        return inner if self.n == 1 else _with_empty(inner, units)


@dataclass(frozen=True)
class Between:
    """Perturb on ascents start <= count < stop, and take base steps outside.

    Late-phase SAM is `Between(int(0.88 * total_steps))`.

    Args:
        start: the first ascent that perturbs, >= 0.
        stop: the first that no longer does, >= start, or None (default) for never.
        inner: any sampler; default `Everything()`.

    Example:
        >>> [Between(1, 3).draw([Unit("w", (1,))], seed=0, count=c).active for c in range(4)]
        [False, True, True, False]
    """

    start: int
    stop: int | None = None
    inner: Sampler = field(default_factory=Everything)

    def __post_init__(self) -> None:
        start = validation.count_number("start", self.start)
        object.__setattr__(self, "start", start)
        if self.stop is not None:
            stop = validation.count_number("stop", self.stop, least=start)
            object.__setattr__(self, "stop", stop)
        check_sampler("inner", self.inner)

    @property
    def needs_blocks(self) -> bool:
        return self.inner.needs_blocks

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        if count < self.start or (self.stop is not None and count >= self.stop):
            return _empty(units)
        return self.inner.draw(units, seed=seed, count=count, stream=stream)

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        return _with_empty(self.inner.masks(units), units)


@dataclass(frozen=True)
class Sometimes:
    """Perturb on a random share p of the ascents, and take base steps on the others.

    A schedule: never rescaled by 1/p.

    Args:
        p: probability in (0, 1] that a step perturbs.
        inner: any sampler; default `Everything()`. Drawn independently of the schedule.

    Example:
        >>> Sometimes(1.0).draw([Unit("w", (1,))], seed=0, count=0).active
        True
    """

    p: float
    inner: Sampler = field(default_factory=Everything)

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", validation.open_unit("p", self.p))
        check_sampler("inner", self.inner)

    @property
    def needs_blocks(self) -> bool:
        return self.inner.needs_blocks

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        (u,) = uniforms(1, seed=seed, count=count, stream=stream)
        if u >= self.p:
            return _empty(units)
        return self.inner.draw(units, seed=seed, count=count, stream=stream + 1)

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        inner = self.inner.masks(units)
        return inner if self.p == 1.0 else _with_empty(inner, units)
