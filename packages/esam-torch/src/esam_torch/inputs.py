"""Protection of the batch: every pass of a step must read the same values."""

from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMRuntimeError
from esam_torch.batch import Batch
from esam_torch.compat import count_writes
from esam_torch.containers import INSIDE, map_values
from esam_torch.losses import LossFunction
from esam_torch.values import tensors_in

__all__ = ["copy_tensors", "read_only"]


def read_only(losses: LossFunction, batch: Batch) -> LossFunction:
    """Return `losses` for the passes of one step, which must not change the batch repeatedly.

    Writing the same values again is allowed, such as `labels[labels < 0] = 0`.

    Args:
        losses: the user's function.
        batch: its arguments. Selected samples are copies, and may be written to unless the batch
            itself was.

    Raises:
        ESAMRuntimeError: (when called) a pass after the first changed the batch in place.
    """
    written = False

    def call_and_compare(*args: Any, **kwargs: Any) -> Any:
        nonlocal written
        tensors = list(tensors_in([args, kwargs]))
        versions = [count_writes(t) for t in tensors]
        copies = [t.detach().clone() for t in tensors] if written else None
        found = losses(*args, **kwargs)
        changed = [t for t, n in zip(tensors, versions, strict=True) if count_writes(t) != n]
        if changed and copies is not None:
            for tensor, copy in zip(tensors, copies, strict=True):
                if not _equal(tensor.detach(), copy):
                    raise ESAMRuntimeError(
                        "`losses` must not change its batch in place, because every pass of a step "
                        "reads it. Received: a tensor of shape "
                        f"{tuple(tensor.shape)} that each pass changed again. Use operations that "
                        "return a new tensor (`x = x.sub(mean)` and not `x.sub_(mean)`), or change "
                        "the batch before the step."
                    )
        if changed and not written:
            own = {id(t) for t in tensors_in([*batch[0], *batch[1].values()])}
            written = any(id(t) in own for t in changed)
        return found

    return call_and_compare


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same elements; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def copy_tensors(batch: Batch) -> Batch:
    """Return the batch with copies of its tensors, for a forward that is not a pass of a step."""

    def copy_tensor(x: Any, _: str) -> Any:
        return x.detach().clone() if type(x) is Tensor and not x.requires_grad else INSIDE

    with torch.no_grad():
        found: Batch = map_values(batch, copy_tensor, strict=False)
    return found
