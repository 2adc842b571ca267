"""Targets: what a mask perturbs, and how, given the options of the parameter groups."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from esam_core import ESAMConfig, Mask, Unit
from esam_torch.groups import options_of
from esam_torch.kinds import Kinds, kinds_of, split_by_kind
from esam_torch.sharded import Spread, spread_of
from esam_torch.values import is_half

__all__ = ["Options", "Targets", "find_targets"]


@dataclass(frozen=True)
class Options:
    """The options that a parameter group may set."""

    rho: float
    adaptive: bool
    perturb: bool = True

    @classmethod
    def of(cls, config: ESAMConfig) -> "Options":
        """Return the options of a group that sets none."""
        return cls(config.rho, config.adaptive)

    @property
    def perturbs(self) -> bool:
        """Whether masks may perturb the group's parameters."""
        return self.perturb and self.rho > 0.0

    def of_group(self, group: Mapping[str, Any]) -> "Options":
        """Return the options of a group, these being the defaults."""
        given = {name.removeprefix("esam_"): value for name, value in options_of(group).items()}
        return replace(self, **given) if given else self


@dataclass(frozen=True)
class Targets:
    """The parameters that one step perturbs, and how.

    Args:
        tensors: the perturbed parameters.
        names: their names.
        scales: m_t / p_t of each.
        factors: (m_t / p_t) rho of each, with rho as scaled by the schedule.
        adaptive: whether the perturbation of each is scaled by its weights.
        idle: trained parameters that are not perturbed in this step.
        idle_adaptive: whether the perturbation of each of these would be scaled by its weights.
        weight_share: share of the perturbable scalar weights that is perturbed, in [0, 1].
    """

    tensors: Sequence[Tensor]
    names: tuple[str, ...]
    scales: Sequence[float]
    factors: Sequence[float]
    adaptive: Sequence[bool]
    idle: Sequence[Tensor]
    idle_adaptive: Sequence[bool]
    weight_share: float

    # -- derived values, computed once -------------------------------------------------------

    @functools.cached_property
    def factor(self) -> float | None:
        """The factor of all parameters, or None if they have different ones."""
        return self.factors[0] if len(set(self.factors)) == 1 else None

    @functools.cached_property
    def any_adaptive(self) -> bool:
        """Whether the perturbation of any parameter is scaled by its weights."""
        return any(self.adaptive)

    @functools.cached_property
    def any_half(self) -> bool:
        """Whether any parameter has fewer than 32 bits."""
        return any(map(is_half, self.tensors))

    @functools.cached_property
    def kinds(self) -> Kinds:
        """The indices of the parameters of each device and dtype."""
        return kinds_of(self.tensors)

    def by_kind(self, values: list[Tensor]) -> list[list[Tensor]]:
        """Return one tensor per parameter, as lists with the same device and dtype."""
        return split_by_kind(values, self.kinds)

    @functools.cached_property
    def spread(self) -> Spread:
        """Which parameters are sharded over which ranks."""
        return spread_of(self.tensors)

    @functools.cached_property
    def idle_spread(self) -> Spread:
        """Which idle parameters are sharded over which ranks."""
        return spread_of(self.idle)


def find_targets(
    tensors: Sequence[Tensor], units: Sequence[Unit], mask: Mask, options: Sequence[Options]
) -> Targets:
    """Return the targets of a mask among the parameters that are trained and may be perturbed.

    Args:
        tensors: T parameters.
        units: T records.
        mask: a mask of T units.
        options: T options, from the parameters' groups.
    """
    perturbed, idle, size, whole = [], [], 0, 0
    for t, (tensor, unit, o, hit) in enumerate(
        zip(tensors, units, options, mask.perturbed, strict=True)
    ):
        if not tensor.requires_grad:
            continue
        if o.perturb:
            whole += unit.size
        if hit and o.perturbs:
            perturbed.append(t)
            size += unit.size
        else:
            idle.append(t)
    scales = [1.0 / mask.probability[t] for t in perturbed]
    return Targets(
        tensors=[tensors[t] for t in perturbed],
        names=tuple(units[t].name for t in perturbed),
        scales=scales,
        factors=[
            s * options[t].rho * mask.rho_factor for s, t in zip(scales, perturbed, strict=True)
        ],
        adaptive=[options[t].adaptive for t in perturbed],
        idle=[tensors[t] for t in idle],
        idle_adaptive=[options[t].adaptive for t in idle],
        weight_share=size / whole * (mask.weight_beta or 1.0) if perturbed else 0.0,
    )
