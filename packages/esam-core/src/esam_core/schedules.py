"""Samplers that decide when to perturb: every n-th step, between two steps, or at random.

Source: `Every` is Composer's `interval`; `Between` is late-phase SAM (Zhou et al. 2025).
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from esam_core import validation
from esam_core.draws import uniforms
from esam_core.errors import ESAMTypeError, ESAMValueError
from esam_core.samplers import Everything, Sampler, check_sampler, distinct
from esam_core.selectors import intended_fraction
from esam_core.units import Mask, Unit

__all__ = ["Between", "Every", "Sometimes"]


def _empty(units: Sequence[Unit]) -> Mask:
    """Return the mask of a step that perturbs nothing."""
    return Mask((False,) * len(units), (1.0,) * len(units))


def _with_empty(inner: tuple[Mask, ...] | None, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
    """Return the inner masks and the empty one, or None if there are too many to list."""
    return None if inner is None else distinct((*inner, _empty(units)))


@dataclass(frozen=True)
class Every:
    """Perturb on every n-th step (0, n, 2n, ...), and take base steps in between.

    This is a schedule: the inclusion probabilities are the inner sampler's.

    Args:
        n: >= 1.
        inner: any sampler; default `Everything()`.
        scale_rho: multiply rho by n on the steps that perturb, so that its mean over all steps
            stays the same, as Composer recommends. Default False.

    Example:
        >>> [Every(2).draw([Unit("w", (1,))], seed=0, count=c).active for c in range(4)]
        [True, False, True, False]
        >>> Every(10, scale_rho=True).draw([Unit("w", (1,))], seed=0, count=0).rho_factor
        10.0
    """

    n: int
    inner: Sampler = field(default_factory=Everything)
    scale_rho: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", validation.count_number("n", self.n, least=1))
        check_sampler("inner", self.inner)
        validation.flag("scale_rho", self.scale_rho)

    @property
    def needs_blocks(self) -> bool:
        return self.inner.needs_blocks

    def _scale_mask(self, mask: Mask) -> Mask:
        """Return the mask with rho multiplied by n if `scale_rho` is set."""
        factor = float(self.n) if self.scale_rho else 1.0
        return replace(mask, rho_factor=mask.rho_factor * factor)

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        if count % self.n:
            return _empty(units)
        return self._scale_mask(self.inner.draw(units, seed=seed, count=count, stream=stream))

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        inner = self.inner.masks(units)
        if inner is None:
            return None
        scaled = tuple(self._scale_mask(mask) for mask in inner)
        return scaled if self.n == 1 else _with_empty(scaled, units)


@dataclass(frozen=True)
class Between:
    """Perturb on steps start <= count < stop, and take base steps outside this range.

    `of_run` and `of_learning_rate` compute the two numbers from shares of the run.

    Args:
        start: the first step that perturbs, >= 0.
        stop: the first later step that does not, >= start, or None (default) for no end.
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

    @classmethod
    def of_run(
        cls, start: float, stop: float = 1.0, *, steps: int, inner: Sampler | None = None
    ) -> "Between":
        """Return the schedule that perturbs in one part of a run.

        Args:
            start: the share of the steps, in [0, 1], before the first step that perturbs.
            stop: the share of the steps before perturbing ends, in [start, 1]. Default 1: until the
                end, and beyond it if the run turns out longer.
            steps: steps in the run, >= 1: updates times batches accumulated per update.
            inner: any sampler; None (default) is `Everything()`.

        Example:
            >>> Between.of_run(0.88, steps=1000)  # late-phase SAM: the last 12 %
            Between(start=880, stop=None, inner=Everything())
        """
        steps = validation.count_number("steps", steps, least=1)
        # The first step that has at least that share of the steps before it, in integers.
        first, last = (-(-s.numerator * steps // s.denominator) for s in _shares(start, stop))
        return cls(first, None if stop == 1 else last, Everything() if inner is None else inner)

    @classmethod
    def of_learning_rate(
        cls,
        start: float,
        stop: float = 1.0,
        *,
        rates: Sequence[float] | Callable[[int], float],
        steps: int | None = None,
        inner: Sampler | None = None,
    ) -> "Between":
        """Return the schedule that perturbs between two shares of the sum of learning rates.

        The sum measures how far the weights can have moved. By this measure "the last tenth" means
        the same for every learning rate schedule. A share of the steps does not: under a cosine
        schedule the last 12 % of the steps contain 0.3 % of the sum.

        Args:
            start: the share of the sum, in [0, 1], before the first step that perturbs.
            stop: the share of the sum before perturbing ends, in [start, 1]. Default 1: until the
                end, and beyond it if the run turns out longer.
            rates: the learning rate of each step, finite and >= 0, at least one > 0: a sequence, a
                NumPy array, or a function of the step count.
            steps: steps in the run, >= 1; required if `rates` is a function.
            inner: any sampler; None (default) is `Everything()`.

        Raises:
            ESAMValueError, ESAMTypeError: an argument is invalid; the message names it.

        Example:
            >>> Between.of_learning_rate(0.9, rates=[0.1] * 90 + [0.01] * 100).start
            90
        """
        sums = _running_sums(rates, steps)
        # The sums are exact, so that with equal rates half of the sum is half of the steps.
        first, last = (bisect.bisect_left(sums, s * sums[-1]) for s in _shares(start, stop))
        return cls(first, None if stop == 1 else last, Everything() if inner is None else inner)

    @property
    def needs_blocks(self) -> bool:
        return self.inner.needs_blocks

    def draw(self, units: Sequence[Unit], *, seed: int, count: int, stream: int = 0) -> Mask:
        if count < self.start or (self.stop is not None and count >= self.stop):
            return _empty(units)
        return self.inner.draw(units, seed=seed, count=count, stream=stream)

    def masks(self, units: Sequence[Unit]) -> tuple[Mask, ...] | None:
        return _with_empty(self.inner.masks(units), units)


def _shares(start: float, stop: float) -> tuple[Fraction, Fraction]:
    """Return two shares as the intended fractions: 0.07 is 7 / 100."""
    start, stop = validation.nonnegative("start", start), validation.nonnegative("stop", stop)
    for name, value in (("start", start), ("stop", stop)):
        if value > 1.0:
            raise ESAMValueError(f"`{name}` must be in [0, 1]. Received: {name}={value!r}.")
    if stop < start:
        raise ESAMValueError(
            f"`stop` must be in [start, 1]. Received: start={start!r}, stop={stop!r}."
        )
    return intended_fraction(start), intended_fraction(stop)


def _running_sums(
    rates: Sequence[float] | Callable[[int], float], steps: int | None
) -> list[Fraction]:
    """Return the sums of the first 0, 1, ..., n learning rates, exactly."""
    if callable(rates):
        if steps is None:
            raise ESAMTypeError(
                "`steps` must be an integer >= 1 if `rates` is a function. Received: steps=None."
            )
        rates = [rates(count) for count in range(validation.count_number("steps", steps, least=1))]
    else:
        must = "a sequence of learning rates, one per step, or a function of the step count"
        rates = validation.sequence("rates", rates, must)
        if steps is not None and steps != len(rates):
            raise ESAMValueError(
                "`steps` must be the number of `rates`. "
                f"Received: steps={steps!r}, {len(rates)} rates."
            )
    sums = [Fraction(0)]
    for rate in rates:
        sums.append(sums[-1] + Fraction(validation.nonnegative("rates", rate)))
    if sums[-1] == 0:
        raise ESAMValueError("`rates` must contain a number > 0. Received: none.")
    return sums


@dataclass(frozen=True)
class Sometimes:
    """Perturb on a random share p of the steps, and take base steps on the others.

    This is a schedule: the perturbation is not rescaled by 1/p.

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
