"""What a mask perturbs, and how: what follows from a mask and the options of parameter groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from esam_core import Mask, Unit

__all__ = ["Options", "Targets", "find_targets"]


@dataclass(frozen=True)
class Options:
    """What a parameter group may say for itself."""

    rho: float
    adaptive: bool
    perturb: bool = True

    def of_group(self, group: Mapping[str, Any]) -> "Options":
        """Return the options of a group, these being the defaults."""
        given = {key[5:]: value for key, value in group.items() if key.startswith("esam_")}
        return replace(self, **given) if given else self


@dataclass(frozen=True)
class Targets:
    """What one step perturbs.

    Args:
        tensors: the perturbed parameters.
        names: their names.
        scales: m_t / p_t of each.
        factors: (m_t / p_t) rho of each, rho as the schedule scales it.
        adaptive: whether each is perturbed in proportion to its weights.
        idle: parameters that are trained and not perturbed in this step.
        idle_adaptive: whether each of these would be perturbed in proportion to its weights.
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


def find_targets(
    tensors: Sequence[Tensor], units: Sequence[Unit], mask: Mask, options: Sequence[Options]
) -> Targets:
    """Return what a mask perturbs of what is trained and may be perturbed.

    Args:
        tensors: T parameters.
        units: T records.
        mask: of T units.
        options: T options, of the groups that hold the parameters.
    """
    perturbed, idle, size, whole = [], [], 0, 0
    for t, (tensor, unit, o, hit) in enumerate(
        zip(tensors, units, options, mask.perturbed, strict=True)
    ):
        if not tensor.requires_grad:
            continue
        if o.perturb:
            whole += unit.size
        if hit and o.perturb and o.rho > 0.0:
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
