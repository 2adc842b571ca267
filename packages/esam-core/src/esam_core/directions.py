"""Where the direction of the climb comes from: what `ascend=` takes.

SAM climbs along the gradient of the whole batch, which costs a forward and a backward. A part of
the batch costs a part of that; a gradient or a momentum of earlier steps is there anyway.

Which of the passes is the one that leaves its traces (`records_at_theta`), and what has to be kept
for the next step (`kept_units`), is said here once, for every backend.

Sources. `Part`: used with 20 % of the batch by Brock et al. 2021 (NFNets, arXiv 2102.06171), with a
quarter by Bahri et al. 2022 (T5, arXiv 2110.08529). `Previous`: the next step that Du et al., ICLR
2022 (arXiv 2110.03141) name in their conclusion. `Momentum`: Becker, Altrock and Risse 2024 (MSAM,
arXiv 2401.12033).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core import validation
from esam_core.errors import ESAMTypeError, ESAMValueError
from esam_core.perturbation import Norm
from esam_core.samplers import Sampler
from esam_core.selectors import Selector, needs_losses, random_indices, subset_size
from esam_core.units import Unit

__all__ = [
    "Batch",
    "Direction",
    "Momentum",
    "Part",
    "Previous",
    "check_direction",
    "check_saved_direction",
    "climbing_indices",
    "kept_units",
    "records_at_theta",
]


@dataclass(frozen=True)
class Batch:
    """Climb along the gradient of the whole batch: SAM, the paper, the default.

    Example:
        >>> climbing_indices(Batch(), 4, seed=0, count=0).tolist()
        [0, 1, 2, 3]
    """


@dataclass(frozen=True)
class Part:
    """Climb along the gradient of a random part of the batch.

    The part is drawn from (seed, count) with the numbers that `Random` draws from: a smaller part
    lies within a larger one, and `Part(0.5)` with `Random(0.5)` climbs and descends on the same
    samples. A selector that scores by loss pays a forward without a graph for the other samples.

    BatchNorm: the part is normalised by its own statistics, and so are the other samples where a
    selector needs their losses. As no pass at theta sees the whole batch, the descent updates the
    running statistics.

    Args:
        share: of the batch, in (0, 1]; ceil(share b) samples, at least one. 1 is `Batch()`.

    Example:
        >>> climbing_indices(Part(0.25), 8, seed=0, count=0).tolist()
        [1, 5]
        >>> climbing_indices(Part(0.5), 8, seed=0, count=0).tolist()
        [1, 2, 5, 6]
    """

    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", validation.open_unit("share", self.share))


@dataclass(frozen=True)
class Previous:
    """Climb along the gradient of the update before: the climb costs no pass.

    That gradient is what the base optimizer's last update was given: the descent gradient, summed
    over the batches that were accumulated, averaged over the ranks, unscaled, clipped. It is not
    the gradient of the last `backward`: that differs from rank to rank, so that a checkpoint of one
    rank could not resume the others, and with accumulation it would be of the same update.

    One copy of the gradient of the units that the sampler can perturb is kept, and saved in
    checkpoints. Steps before the first update are base steps. A unit that had no gradient in the
    last update is not perturbed; an update in which no unit had one is none.

    A selector that needs the losses at theta pays a forward without a graph for them.

    Args:
        sign: 1 (default) along the gradient, -1 against it.
    """

    sign: int = 1

    def __post_init__(self) -> None:
        _check_sign(self)


@dataclass(frozen=True)
class Momentum:
    """Climb along the first moment that the base optimizer keeps: the climb costs no pass.

    The first moment is SGD's momentum buffer, Adam's running mean of the gradients (before its
    bias is corrected), and their like: whatever the base has added to the gradient (weight decay)
    is in it. Nothing is kept for it. A base without a first moment is refused. Steps until the
    base has made its first update are base steps.

    A selector that needs the losses at theta pays a forward without a graph for them.

    Args:
        sign: -1 (default), to where the momentum carries the weights, as in MSAM; or 1.
    """

    sign: int = -1

    def __post_init__(self) -> None:
        _check_sign(self)


#: What `ascend=` takes.
Direction = Batch | Part | Previous | Momentum


def _check_sign(direction: Previous | Momentum) -> None:
    """Refuse a sign that is neither 1 nor -1."""
    sign = direction.sign
    if isinstance(sign, bool) or sign not in (1, -1):
        raise ESAMValueError(f"`sign` must be 1 or -1. Received: sign={sign!r}.")
    object.__setattr__(direction, "sign", int(sign))


def check_direction(name: str, value: Any) -> Direction:
    """Return `value` if it is one of our directions, and not its class."""
    if not isinstance(value, Batch | Part | Previous | Momentum):
        raise ESAMTypeError(
            f"`{name}` must be Batch(), Part(share), Previous() or Momentum(). "
            f"Received: {name}={value!r}."
        )
    return value


def climbing_indices(
    direction: Direction, batch_size: int, *, seed: int, count: int
) -> NDArray[np.intp]:
    """Return the ascending indices of the samples whose gradient is climbed along.

    Args:
        direction: any.
        batch_size: b >= 1.
        seed: in [0, 2**64).
        count: the number of the ascent, >= 0.

    Returns:
        (n,) indices: all b with `Batch`, none with `Previous` and `Momentum`.
    """
    if isinstance(direction, Part):
        n = subset_size(direction.share, batch_size)
        return random_indices(batch_size, n, seed=seed, count=count)
    return np.arange(batch_size if isinstance(direction, Batch) else 0)


def records_at_theta(direction: Direction, selector: Selector, batch_size: int) -> bool:
    """Return whether it is a pass at theta, and not the descent, that leaves its traces.

    Each step updates BatchNorm's running statistics once, and leaves the random state as that one
    pass does: the first that sees the whole batch at theta; where there is none, the descent. A
    descent on one sample has no statistics of its own: then the part that climbs.

    Args:
        direction: any.
        selector: any.
        batch_size: b >= 1.

    Example:
        >>> from esam_core import All, TopLoss
        >>> records_at_theta(Batch(), All(), 8), records_at_theta(Part(0.5), All(), 8)
        (True, False)
        >>> records_at_theta(Previous(), All(), 8), records_at_theta(Previous(), TopLoss(), 8)
        (False, True)
    """
    if isinstance(direction, Batch):
        return True
    if isinstance(direction, Part):
        whole = subset_size(direction.share, batch_size) == batch_size
        return whole or subset_size(selector.gamma, batch_size) == 1
    return needs_losses(selector, batch_size)


def kept_units(
    sampler: Sampler, units: Sequence[Unit], allowed: Sequence[bool], *, norm: Norm
) -> tuple[bool, ...]:
    """Return for each unit whether `Previous` keeps its gradient for the step after.

    Args:
        sampler: of the masks.
        units: T records.
        allowed: T booleans, whether the unit may be perturbed.
        norm: with "full" all are kept, as all are in the norm.

    Example:
        >>> from esam_core import Suffix, Unit
        >>> units = [Unit("a", (2,), block="stem"), Unit("b", (2,), block="head")]
        >>> kept_units(Suffix("head"), units, [True, True], norm="masked")
        (False, True)
    """
    if norm == "full":
        return (True,) * len(units)
    masks = sampler.masks(units)
    if masks is None:
        return tuple(map(bool, allowed))
    return tuple(bool(may) and any(m.perturbed[t] for m in masks) for t, may in enumerate(allowed))


def check_saved_direction(
    saved: Mapping[str, tuple[int, ...]], units: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a saved direction that is not of this model.

    Args:
        saved: the shapes of the gradients in a checkpoint, by name.
        units: the shapes of the model's trained parameters, by name.

    Raises:
        ESAMValueError: a name is not the model's, or a shape is another.
    """
    for name, shape in saved.items():
        if name not in units or tuple(units[name]) != tuple(shape):
            has = f"shape {tuple(units[name])}" if name in units else "no such parameter"
            raise ESAMValueError(
                "The direction in a checkpoint must hold gradients of this model's parameters. "
                f"Received: {name!r} of shape {tuple(shape)}, and the model has {has}. Load the "
                "checkpoint of this model, or leave the direction out: the next step is then a "
                "base step."
            )
