"""Non-finite losses and gradients: propagated without waiting, or checked once per step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esam_torch.devices import on_device
from esam_torch.sharded import local

__all__ = ["all_finite", "poisoned"]


def poisoned(total: Tensor, finite: Tensor) -> Tensor:
    """Return the loss, or NaN, which makes all gradients NaN, if a value was not finite."""
    return total * torch.where(finite, 1.0, torch.nan)


def all_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Return whether every gradient is finite: the one synchronisation of "skip" and "raise"."""
    own = [local(g) for g in gradients if g is not None]
    values = [g._values() if g.is_sparse else g for g in own]
    values = [v for v in values if v.numel() > 0]
    if not values:
        return True
    largest = torch._foreach_norm(values, torch.inf)
    device = values[0].device
    return bool(torch.stack([on_device(m.float(), device) for m in largest]).isfinite().all())
