"""Non-finite losses and gradients: propagated without waiting, or checked once per step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esam_core import NonFiniteError
from esam_torch.devices import on_device
from esam_torch.sharded import local

__all__ = ["all_finite", "flaw_in", "nan_if_flawed", "not_finite", "zero_unless"]

#: Integer types by the size of an element in bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flaw_in(values: Tensor) -> Tensor:
    """Return 0 if all values are finite, else NaN: 0-d, of float32."""
    return (values.detach() * 0.0).sum(dtype=torch.float32)


def nan_if_flawed(total: Tensor, flaw: Tensor) -> Tensor:
    """Return the loss, times NaN if it is not finite or a flaw is given: all gradients are NaN."""
    return total * (flaw + total.detach() * 0.0 + 1.0)


def not_finite(count: int) -> NonFiniteError:
    """Return the error for a step that is not finite."""
    return NonFiniteError(
        f"A loss or gradient of step {count} is not finite; weights and buffers are as before the "
        'call, and nothing was added to the gradients. Use on_nonfinite="skip" to skip such '
        "steps."
    )


def zero_unless(usable: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set tensors of one device and dtype to 0, in place, unless a 0-d condition holds.

    0 times NaN is NaN, so their bits are multiplied, as integers: in one call, without waiting.
    """
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    dtype = _INTEGERS[real[0].element_size()]
    keep = on_device(usable, real[0].device).to(dtype)
    torch._foreach_mul_([t.view(dtype) for t in real], keep)


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
