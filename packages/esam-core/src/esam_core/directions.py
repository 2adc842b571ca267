"""Ascent directions: the values of `ascend=`.

SAM perturbs along the gradient of the whole batch, which costs a forward and a backward pass. A
part of the batch costs a part of that; a gradient or momentum kept from earlier steps costs no
pass.

This module also defines, for all backends, which pass updates the BatchNorm statistics and the
random state (`records_at_theta`), and which gradients are kept for the next step (`kept_units`).

Sources. `Part`: used with 20 % of the batch by Brock et al. 2021 (NFNets, arXiv 2102.06171), with a
quarter by Bahri et al. 2022 (T5, arXiv 2110.08529). `Previous`: proposed as future work in the
conclusion of Du et al., ICLR 2022 (arXiv 2110.03141). `Momentum`: Becker, Altrock and Risse 2024
(MSAM, arXiv 2401.12033).
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core import validation
from esam_core.errors import ESAMTypeError, ESAMValueError
from esam_core.perturbation import Norm
from esam_core.reach import reachable
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
    "check_statistics",
    "climbing_indices",
    "kept_units",
    "records_at_theta",
]


@dataclass(frozen=True)
class Batch:
    """Perturb along the gradient of the whole batch, as SAM and the paper do. The default.

    Example:
        >>> climbing_indices(Batch(), 4, seed=0, count=0).tolist()
        [0, 1, 2, 3]
    """


@dataclass(frozen=True)
class Part:
    """Perturb along the gradient of a random part of the batch.

    The part is drawn from (seed, count), with the same random numbers as `Random`. A smaller part
    is therefore a subset of a larger one, and `Part(0.5)` with `Random(0.5)` uses the same samples
    in the ascent and the descent pass. A selector that scores by loss needs a forward pass without
    gradients for the other samples.

    BatchNorm normalises the part by the part's own statistics, and the other samples, if a selector
    needs their losses, by theirs. Because no pass at theta sees the whole batch, the descent pass
    updates the running statistics.

    Args:
        share: the share of the batch, in (0, 1]; ceil(share b) samples. 1 is the same as `Batch()`.

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
    """Perturb along the gradient of the previous update: there is no ascent pass.

    This is the gradient that the base optimizer received at its last update: the descent gradient,
    summed over the accumulated batches, averaged over the ranks, unscaled and clipped. It is not
    the gradient of the last `backward`: that one differs between ranks, so one rank's checkpoint
    could not resume the others, and with accumulation it would belong to the current update.

    One copy of the gradients of all units that the sampler can perturb is kept, and saved in
    checkpoints. Steps before the first update are base steps. A unit without a gradient in the last
    update is not perturbed. An update in which no unit had a gradient is ignored.

    A selector that needs the losses at theta needs a forward pass without gradients for them.

    Args:
        sign: 1 (default) along the gradient, -1 against it.
    """

    sign: int = 1

    def __post_init__(self) -> None:
        _check_sign(self)


@dataclass(frozen=True)
class Momentum:
    """Perturb along the base optimizer's first moment: there is no ascent pass.

    The first moment is SGD's momentum buffer, Adam's running mean of the gradients (before bias
    correction), or the equivalent in other optimizers. It includes terms that the base optimizer
    adds to the gradient, such as weight decay. It needs no extra memory. A base optimizer without a
    first moment raises an error. Steps before the first update are base steps.

    A selector that needs the losses at theta needs a forward pass without gradients for them.

    Args:
        sign: -1 (default), the direction in which momentum moves the weights, as in MSAM; or 1.
    """

    sign: int = -1

    def __post_init__(self) -> None:
        _check_sign(self)


#: The values of `ascend=`.
Direction = Batch | Part | Previous | Momentum


def _check_sign(direction: Previous | Momentum) -> None:
    """Raise ESAMValueError if the sign is neither 1 nor -1."""
    sign = direction.sign
    if isinstance(sign, bool) or not isinstance(sign, numbers.Real) or sign not in (1, -1):
        raise ESAMValueError(f"`sign` must be 1 or -1. Received: sign={sign!r}.")
    object.__setattr__(direction, "sign", int(sign))


def check_direction(name: str, value: Any) -> Direction:
    """Return `value` if it is an instance of a direction class of this module."""
    if not isinstance(value, Batch | Part | Previous | Momentum):
        raise ESAMTypeError(
            f"`{name}` must be Batch(), Part(share), Previous() or Momentum(). "
            f"Received: {name}={value!r}."
        )
    return value


def climbing_indices(
    direction: Direction, batch_size: int, *, seed: int, count: int
) -> NDArray[np.intp]:
    """Return the indices of the samples in the ascent pass, in ascending order.

    Args:
        direction: any.
        batch_size: b >= 1.
        seed: in [0, 2**64).
        count: the step count, >= 0.

    Returns:
        (n,) indices: all b with `Batch`, none with `Previous` and `Momentum`.
    """
    if isinstance(direction, Part):
        n = subset_size(direction.share, batch_size)
        return random_indices(batch_size, n, seed=seed, count=count)
    return np.arange(batch_size if isinstance(direction, Batch) else 0)


def records_at_theta(direction: Direction, selector: Selector, batch_size: int) -> bool:
    """Return whether a pass at theta, rather than the descent pass, updates the running state.

    One pass per step updates BatchNorm's running statistics and determines the random state after
    the step. It is the first pass at theta over the whole batch or, if there is none, the descent
    pass. A descent pass on one sample has no batch statistics; the ascent pass on the part then
    updates them.

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


def check_statistics(direction: Direction, selector: Selector, batch_size: int) -> None:
    """Raise if a step would not update the running statistics of a model with BatchNorm.

    A pass on one of several samples has no batch statistics.

    Args:
        direction: any.
        selector: any.
        batch_size: b >= 1.

    Raises:
        ESAMValueError: the descent pass, and the pass at theta if there is one, run on one sample.

    Example:
        >>> from esam_core import Random
        >>> check_statistics(Batch(), Random(0.5), 2)  # the ascent pass sees both samples
        >>> check_statistics(Previous(), Random(0.5), 4)  # the descent pass sees two of four
    """
    if batch_size == 1 or subset_size(selector.gamma, batch_size) > 1:
        return
    of_one = isinstance(direction, Part) and subset_size(direction.share, batch_size) == 1
    if of_one or not records_at_theta(direction, selector, batch_size):
        raise ESAMValueError(
            f"With ascend={direction!r}, BatchNorm needs at least 2 selected samples: no other "
            "pass updates its running statistics. Use a larger `gamma`, larger batches (and drop "
            f"the last one if it is smaller) or ascend=Batch(). Received: select={selector!r}, "
            f"which selects 1 of {batch_size} samples."
        )


def kept_units(
    sampler: Sampler, units: Sequence[Unit], allowed: Sequence[bool], *, norm: Norm
) -> tuple[bool, ...]:
    """Return, for each unit, whether `Previous` keeps its gradient for the next step.

    Args:
        sampler: the sampler of the masks.
        units: T records.
        allowed: T booleans, whether the unit may be perturbed.
        norm: with "full" all gradients are kept, because all enter the norm.

    Example:
        >>> from esam_core import Suffix, Unit
        >>> units = [Unit("a", (2,), block="stem"), Unit("b", (2,), block="head")]
        >>> kept_units(Suffix("head"), units, [True, True], norm="masked")
        (False, True)
    """
    if norm == "full":
        return (True,) * len(units)
    return reachable(sampler, units, allowed)


def check_saved_direction(
    saved: Mapping[str, tuple[int, ...]], units: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ESAMValueError if a saved direction does not fit this model.

    Args:
        saved: the shapes of the gradients in a checkpoint, by name.
        units: the shapes of the model's trained parameters, by name.

    Raises:
        ESAMValueError: the model has no parameter of that name, or its shape differs.
    """
    for name, shape in saved.items():
        if name not in units or tuple(units[name]) != tuple(shape):
            has = f"shape {tuple(units[name])}" if name in units else "no such parameter"
            raise ESAMValueError(
                "The direction in a checkpoint must hold gradients of this model's parameters. "
                f"Received: {name!r} of shape {tuple(shape)}, and the model has {has}. Load a "
                "checkpoint of this model, or leave the direction out: the next step is then a "
                "base step."
            )
