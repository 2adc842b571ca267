"""Units and masks: the inputs and outputs of samplers.

A *unit* is one parameter tensor. A *mask* records which units a step perturbs, and the probability
with which each was drawn.

Source: Du et al., ICLR 2022 (arXiv 2110.03141), section 3.2 and equation 6.
"""

import functools
import math
import re
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from esam_core import validation
from esam_core.errors import ESAMValueError

__all__ = ["KINDS", "Mask", "Unit", "block_order", "cache_for_units", "names_a_norm"]

#: The kinds of unit. "norm" is a scale or shift of a normalisation layer, "bias" any other bias,
#: "embedding" a look-up table, "weight" everything else.
KINDS = ("weight", "bias", "norm", "embedding")

#: "Norm" in a name, but not as in "Normal", nor as in spectral norm and weight norm, whose layers
#: hold the weights of others.
_NORM = re.compile("(?<!pectral)(?<!eight)(?<!pectral_)(?<!eight_)([Nn]orm|NORM)(?!al(?!i[sz]))")


def names_a_norm(name: str) -> bool:
    """Return whether the name of a layer's class is that of a normalisation layer.

    Example:
        >>> [names_a_norm(name) for name in ("LlamaRMSNorm", "batch_norm", "RMSNormalization")]
        [True, True, True]
        >>> [names_a_norm(name) for name in ("NormalHead", "SpectralNorm", "weight_norm")]
        [False, False, False]
    """
    return _NORM.search(name) is not None


@dataclass(frozen=True)
class Unit:
    """One parameter tensor, as samplers and the cost model see it.

    Args:
        name: the parameter's full name, such as "layer3.0.conv1.weight".
        shape: its shape; () for a scalar.
        kind: one of `KINDS`.
        block: the name of the block that uses it, such as "layer3.0".
        cost: forward cost of its layer, >= 0, in any unit that is the same for the whole model
            (such as multiply-adds). Only shares of the total matter.
        depth: position of the block in the order of execution, >= 0. Blocks of equal depth keep the
            order in which they first appear among the units.
        trained: whether a gradient is computed for it. A frozen unit costs only a forward pass, and
            is not perturbed.

    Example:
        >>> Unit("head.weight", (10, 64), kind="weight", block="head", cost=640.0, depth=2).size
        640
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "weight"
    block: str = ""
    cost: float = 0.0
    depth: int = 0
    trained: bool = True

    def __post_init__(self) -> None:
        validation.choice("kind", self.kind, KINDS)
        validation.nonnegative("cost", self.cost)
        validation.count_number("depth", self.depth)

    @property
    def size(self) -> int:
        """Number of scalar weights."""
        return int(math.prod(self.shape))


@dataclass(frozen=True)
class Mask:
    """Which units one step perturbs, and with which probability. Hashable.

    Args:
        perturbed: T booleans, m_t.
        probability: T inclusion probabilities p_t in [0, 1], conditional on the step being
            active; p_t > 0 wherever m_t is True.
        weight_beta: None, or the share in (0, 1] of the *scalar weights* of the perturbed units
            that are perturbed; backends draw each weight independently, from `weight_seed`.
        weight_seed: seed in [0, 2**63) of that draw, else None.
        rho_factor: factor of rho in this step, > 0. Default 1. Unlike m_t / p_t, it does not enter
            the norm.

    Raises:
        ESAMValueError, ESAMTypeError: an argument is invalid; the message names it.

    Example:
        >>> Mask((True, False), (0.5, 0.5)).scale
        (2.0, 0.0)
    """

    perturbed: tuple[bool, ...]
    probability: tuple[float, ...]
    weight_beta: float | None = None
    weight_seed: int | None = None
    rho_factor: float = 1.0

    def __post_init__(self) -> None:
        if len(self.perturbed) != len(self.probability):
            raise ESAMValueError(
                "`probability` must be one number per unit. Received: "
                f"{len(self.probability)} numbers for {len(self.perturbed)} units."
            )
        # Every step makes a mask, and most have few different probabilities.
        if not all(0.0 < p <= 1.0 for p in set(self.probability)):
            for m, p in zip(self.perturbed, self.probability, strict=True):
                if not 0.0 <= p <= 1.0 or (m and p == 0.0):
                    raise ESAMValueError(
                        "`probability` must be in [0, 1], and > 0 for units that are perturbed. "
                        f"Received: {p!r} for a unit with perturbed={m!r}."
                    )
        if (self.weight_beta is None) != (self.weight_seed is None):
            raise ESAMValueError(
                "`weight_beta` and `weight_seed` must be given together. Received: "
                f"weight_beta={self.weight_beta!r}, weight_seed={self.weight_seed!r}."
            )
        if self.weight_beta is not None:
            validation.open_unit("weight_beta", self.weight_beta)
            validation.count_number("weight_seed", self.weight_seed, most=2**63 - 1)
        validation.positive("rho_factor", self.rho_factor)

    @property
    def active(self) -> bool:
        """Whether anything is perturbed. If not, the step is a base step."""
        return any(self.perturbed)

    @property
    def scale(self) -> tuple[float, ...]:
        """The T factors m_t / p_t of equation 6; 0 for units not perturbed."""
        return tuple(
            1.0 / p if m else 0.0 for m, p in zip(self.perturbed, self.probability, strict=True)
        )

    def within(self, allowed: Iterable[bool]) -> "Mask":
        """Return this mask without the units for which `allowed` is False."""
        kept = tuple(m and bool(a) for m, a in zip(self.perturbed, allowed, strict=True))
        return replace(self, perturbed=kept)


def block_order(units: Sequence[Unit]) -> tuple[str, ...]:
    """Return the names of the blocks in order of execution."""
    depths: dict[str, int] = {}
    for unit in units:
        depths[unit.block] = min(depths.get(unit.block, unit.depth), unit.depth)
    return tuple(sorted(depths, key=lambda block: depths[block]))  # sorted() is stable


_Result = TypeVar("_Result")
_What = TypeVar("_What", bound=Hashable)

#: How many results `cache_for_units` keeps for each function.
_KEPT = 32


def cache_for_units(
    function: Callable[[_What, Sequence[Unit]], _Result],
) -> Callable[[_What, Sequence[Unit]], _Result]:
    """Cache the results of a function of an object and a tuple of units.

    Backends call such functions in every step with the same tuple. The cache compares the tuple by
    identity, which is faster than comparing its units. Several threads may call them at a time.
    """
    lock = threading.Lock()
    kept: dict[tuple[_What, int], tuple[Sequence[Unit], _Result]] = {}

    @functools.wraps(function)
    def wrapper(what: _What, units: Sequence[Unit]) -> _Result:
        if not (isinstance(units, tuple) and isinstance(what, Hashable)):
            return function(what, units)
        found = kept.get((what, id(units)))
        if found is not None and found[0] is units:
            return found[1]
        result = function(what, units)
        with lock:
            while len(kept) >= _KEPT:
                del kept[next(iter(kept))]
            kept[what, id(units)] = units, result
        return result

    return wrapper
