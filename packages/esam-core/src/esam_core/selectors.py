"""Sharpness-sensitive data selection (SDS): which samples the descent pass uses.

A *selector* defines the score by which samples are selected, and how many. `select` is the NumPy
reference for what every backend does on its own device.

Source: Du et al., ICLR 2022 (arXiv 2110.03141), section 3.3, equations 7 to 10, appendix A.2.
"""

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from esam_core import validation
from esam_core.draws import OFFSET_STREAM, SELECTION_STREAM, uniforms
from esam_core.errors import ESAMTypeError, ESAMValueError

__all__ = [
    "All",
    "Proportional",
    "Random",
    "Selection",
    "Selector",
    "TopIncrease",
    "TopLoss",
    "inclusion_probabilities",
    "needs_losses",
    "needs_perturbed_losses",
    "random_indices",
    "select",
    "subset_size",
    "systematic_indices",
    "systematic_offset",
    "top_indices",
]


@runtime_checkable
class Selector(Protocol):
    """The type of `select=`: one of the classes below. Backends read these three attributes.

    Attributes:
        gamma: share of the batch that is selected, in (0, 1].
        rule: "top" (largest scores), "random" (uniform), "proportional" (drawn by score) or "all".
        score: "increase" (perturbed minus unperturbed loss), "loss" (unperturbed) or None.
    """

    @property
    def gamma(self) -> float:
        """Share of the batch that is selected."""
        ...

    @property
    def rule(self) -> str:
        """How samples are selected."""
        ...

    @property
    def score(self) -> str | None:
        """The score by which samples are selected."""
        ...


@dataclass(frozen=True)
class TopIncrease:
    """Select the samples whose loss the perturbation increases most, as in the paper. The default.

    Args:
        gamma: share of the batch that is selected, in (0, 1]. Default 0.5.

    Example:
        >>> import numpy as np
        >>> before, after = np.array([1.0, 1.0, 1.0, 1.0]), np.array([1.1, 1.4, 1.2, 1.3])
        >>> select(TopIncrease(0.5), before, after, seed=0, count=0).indices.tolist()
        [1, 3]
    """

    gamma: float = 0.5
    rule: ClassVar[str] = "top"
    score: ClassVar[str | None] = "increase"

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", validation.open_unit("gamma", self.gamma))


@dataclass(frozen=True)
class TopLoss:
    """Select the samples with the largest loss: no selection pass (appendix A.2: they correlate).

    Args:
        gamma: share of the batch that is selected, in (0, 1]. Default 0.5.

    Example:
        >>> import numpy as np
        >>> losses = np.array([0.1, 2.0, 0.3, 1.0])
        >>> select(TopLoss(0.5), losses, None, seed=0, count=0).indices.tolist()
        [1, 3]
    """

    gamma: float = 0.5
    rule: ClassVar[str] = "top"
    score: ClassVar[str | None] = "loss"

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", validation.open_unit("gamma", self.gamma))


@dataclass(frozen=True)
class Random:
    """Select a uniformly random subset, drawn on the host from (seed, count): a baseline.

    Args:
        gamma: share of the batch that is selected, in (0, 1]. Default 0.5.

    Example:
        >>> import numpy as np
        >>> kept = select(Random(0.5), np.zeros(4), None, seed=0, count=0)
        >>> len(kept.indices), kept.weights.tolist()
        (2, [0.5, 0.5])
    """

    gamma: float = 0.5
    rule: ClassVar[str] = "random"
    score: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", validation.open_unit("gamma", self.gamma))


@dataclass(frozen=True)
class Proportional:
    """Select exactly k samples, drawn in proportion to a score, and reweight them.

    Sample i is selected with probability pi_i, proportional to its score plus a floor, and gets
    the weight 1 / (b pi_i). This corresponds to 1/beta for weights: the expected descent gradient
    is that of the whole batch. This selector is ours, not the paper's.

    Args:
        gamma: share of the batch that is selected, in (0, 1]. Default 0.5.
        score: "loss" (default; free) or "increase" (costs the selection pass). Negative scores
            count as 0.
        floor: added to each score, as a multiple of the mean score, in [1e-6, 1e6]. With the
            default, 1.0, every sample is at least half as likely as under uniform sampling, so that
            no weight exceeds 2/k.

    Example:
        >>> import numpy as np
        >>> losses = np.array([1.0, 1.0, 1.0, 5.0])
        >>> kept = select(Proportional(0.5), losses, None, seed=0, count=0)
        >>> len(kept.indices)
        2
    """

    gamma: float = 0.5
    score: str | None = "loss"
    floor: float = 1.0
    rule: ClassVar[str] = "proportional"

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", validation.open_unit("gamma", self.gamma))
        score = validation.choice("score", self.score, ("loss", "increase"))
        object.__setattr__(self, "score", score)
        floor = validation.positive("floor", self.floor)
        if not 1e-6 <= floor <= 1e6:  # sums of such floors are exact enough in float32
            raise ESAMValueError(
                f"`floor` must be in [1e-06, 1e+06]. Received: floor={self.floor!r}."
            )
        object.__setattr__(self, "floor", floor)


@dataclass(frozen=True)
class All:
    """Select every sample: gamma = 1, no selection pass, no data selection.

    Example:
        >>> import numpy as np
        >>> select(All(), np.zeros(4), None, seed=0, count=0).weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    gamma: ClassVar[float] = 1.0
    rule: ClassVar[str] = "all"
    score: ClassVar[str | None] = None


@dataclass(frozen=True)
class Selection:
    """The samples that a step selects.

    Args:
        indices: (k,) ascending indices into the batch.
        weights: (k,) factors w_i of the losses in the descent pass.
        threshold: alpha, the k-th largest sharpness; None if no sharpness was computed.
    """

    indices: NDArray[np.intp]
    weights: NDArray[np.float64]
    threshold: float | None


def subset_size(gamma: float, batch_size: int) -> int:
    """Return k = max(1, ceil(gamma b)), by exact rational arithmetic.

    In floating point 0.07 * 100 is slightly more than 7 and its ceiling is 8. Therefore gamma is
    read as the nearest fraction with a denominator up to 10**6.

    Args:
        gamma: the share, in (0, 1].
        batch_size: b >= 1.

    Raises:
        ESAMValueError, ESAMTypeError: gamma is not a number in (0, 1], or b is not an integer >= 1.

    Example:
        >>> subset_size(0.07, 100), subset_size(0.5, 7), subset_size(0.1, 1)
        (7, 4, 1)
    """
    gamma = validation.open_unit("gamma", gamma)
    return _ceiling(gamma, validation.count_number("batch_size", batch_size, least=1))


def intended_fraction(share: float) -> Fraction:
    """Return the fraction that a share is meant to be: 7 / 100 for 0.07, which is a bit larger."""
    return Fraction(share).limit_denominator(10**6)


@functools.lru_cache(maxsize=1024)
def _ceiling(gamma: float, batch_size: int) -> int:
    """Return max(1, ceil(gamma b)) for valid arguments."""
    product = intended_fraction(gamma) * batch_size
    return max(1, -(-product.numerator // product.denominator))


def needs_losses(selector: Selector, batch_size: int) -> bool:
    """Return whether the selection needs the losses at theta: not if all b samples are selected."""
    return selector.score is not None and subset_size(selector.gamma, batch_size) < batch_size


def needs_perturbed_losses(selector: Selector, batch_size: int) -> bool:
    """Return whether the selection pass is needed: not if all b samples are selected."""
    return selector.score == "increase" and needs_losses(selector, batch_size)


def top_indices(scores: NDArray[np.floating[Any]], k: int) -> NDArray[np.intp]:
    """Return the indices of the k largest scores, ascending.

    Among samples with equal scores, the one with the lower index is selected. NaN counts as
    infinite: a sample with a NaN loss is rejected only for others that are not finite.
    """
    scores = np.asarray(scores)
    order = np.argsort(-np.where(np.isnan(scores), np.inf, scores), kind="stable")
    return np.sort(order[:k])


def random_indices(batch_size: int, k: int, *, seed: int, count: int) -> NDArray[np.intp]:
    """Return k of b indices, drawn uniformly on the host, ascending; the same on every backend."""
    keys = uniforms(batch_size, seed=seed, count=count, stream=SELECTION_STREAM)
    return top_indices(keys, k)


def systematic_offset(*, seed: int, count: int) -> float:
    """Return the uniform number in [0, 1) that systematic sampling needs."""
    return float(uniforms(1, seed=seed, count=count, stream=OFFSET_STREAM)[0])


def inclusion_probabilities(
    scores: NDArray[np.floating[Any]], k: int, floor: float
) -> NDArray[np.float64]:
    """Return the inclusion probabilities pi_i in (0, 1], which sum to k.

    They are proportional to q_i = score + floor. If k q_i / sum(q) exceeds 1, the sample is
    certain (pi_i = 1), and the other samples share the remainder.

    Args:
        scores: (b,); negative ones, also -inf, count as 0. If all are 0, or their mean is not
            finite, the draw is uniform.
        k: how many samples are drawn, 1 <= k <= b.
        floor: added to each score, as a multiple of the mean score, > 0.

    Example:
        >>> inclusion_probabilities(np.array([0.0, 0.0, 8.0, 0.0]), 2, floor=0.5).tolist()
        [0.3333333333333333, 0.3333333333333333, 1.0, 0.3333333333333333]
    """
    clipped = np.maximum(np.asarray(scores, dtype=np.float64), 0.0)
    mean = clipped.mean()
    if mean == 0.0 or not np.isfinite(mean):
        return np.full(len(clipped), k / len(clipped))
    q = clipped + floor * mean
    certain = np.zeros(len(q), dtype=bool)
    while True:
        left = k - int(certain.sum())
        pi = np.where(certain, 1.0, left * q / q[~certain].sum()) if left else certain * 1.0
        over = ~certain & (pi >= 1.0)
        if not over.any():
            return pi
        certain |= over
        if certain.all():
            return np.ones(len(q))


def systematic_indices(pi: NDArray[np.floating[Any]], offset: float) -> NDArray[np.intp]:
    """Return exactly k = sum(pi) indices, i with probability pi_i, ascending.

    Place the samples end to end as intervals of length pi_i, and select those that contain one of
    the points offset, offset + 1, ..., offset + k - 1.
    """
    ends = np.cumsum(np.asarray(pi, dtype=np.float64))
    k = int(np.rint(ends[-1]))
    found = np.searchsorted(ends, offset + np.arange(k), side="right")
    # A point that rounding places after the last interval belongs to the last sample, once.
    return np.minimum(found, np.arange(len(ends) - k, len(ends)))


def select(
    selector: Selector,
    losses: NDArray[np.floating[Any]],
    perturbed_losses: NDArray[np.floating[Any]] | None,
    *,
    seed: int,
    count: int,
) -> Selection:
    """Return the samples that `selector` selects: the reference for every backend's selection.

    Args:
        selector: one of this module's selectors.
        losses: (b,) losses at theta.
        perturbed_losses: (b,) losses at theta + epsilon; None if the selector's score does not need
            them, or if k = b.
        seed: in [0, 2**64).
        count: the step count, >= 0.

    Returns:
        A `Selection`. With k = b all samples are selected with weights 1/b, for every selector.

    Raises:
        ESAMValueError: the losses are not one number per sample, or perturbed losses are missing.
    """
    shapes = [np.shape(a) for a in (losses, perturbed_losses) if a is not None]
    if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
        raise ESAMValueError(
            "`losses` and `perturbed_losses` must have the same shape, (b,). Received: "
            f"{', '.join(map(str, shapes))}."
        )
    b = len(losses)
    k = subset_size(selector.gamma, b)
    increase = None if perturbed_losses is None else perturbed_losses - losses
    threshold = None if increase is None else float(np.sort(increase)[b - k])
    if k == b:
        return Selection(np.arange(b), np.full(b, 1.0 / b), threshold)
    if selector.rule == "random":
        indices = random_indices(b, k, seed=seed, count=count)
        return Selection(indices, np.full(k, 1.0 / k), threshold)
    scores = increase if selector.score == "increase" else losses
    if scores is None:
        raise ESAMValueError(f"{selector!r} needs the perturbed losses. Received: None.")
    if selector.rule == "top":
        return Selection(top_indices(scores, k), np.full(k, 1.0 / k), threshold)
    floor = cast(Proportional, selector).floor  # there are only these four rules
    pi = inclusion_probabilities(scores, k, floor)
    indices = systematic_indices(pi, systematic_offset(seed=seed, count=count))
    return Selection(indices, 1.0 / (b * pi[indices]), threshold)


def check_selector(name: str, value: Any) -> Selector:
    """Return `value` if it is an instance of a selector class of this module."""
    if not isinstance(value, TopIncrease | TopLoss | Random | Proportional | All):
        raise ESAMTypeError(
            f"`{name}` must be a selector such as TopIncrease(0.5) or TopLoss(0.5). "
            f"Received: {name}={value!r}."
        )
    return value
