"""Protection of the batch: every pass of a step must read the same values."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMRuntimeError
from esam_torch.batch import Batch
from esam_torch.compat import count_all_writes
from esam_torch.containers import (
    INSIDE,
    is_object_of_samples,
    is_tensor_collection,
    map_values,
    tensors_inside,
)
from esam_torch.lookups import defines
from esam_torch.losses import LossFunction
from esam_torch.values import can_be_written

__all__ = ["Unwritten", "copy_tensors", "read_only"]


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
        tensors = _tensors_of((args, kwargs))
        versions = count_all_writes(tensors)
        copies = [t.detach().clone() for t in tensors] if written else None
        found = losses(*args, **kwargs)
        now = count_all_writes(tensors)
        changed = [t for t, n, m in zip(tensors, versions, now, strict=True) if n != m]
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
            own = {id(t) for t in _tensors_of(batch)}
            written = any(id(t) in own for t in changed)
        return found

    return call_and_compare


class Unwritten:
    """The batch and the weights between a loss and its backward, whose passes read them again.

    Args:
        batch: arguments of `losses`.
        weights: the trained weights.
    """

    def __init__(self, batch: Batch, weights: Sequence[Tensor]) -> None:
        self._batch = batch
        self._inputs = _tensors_of(batch)
        self._weights = weights
        self._writes = self._count()

    def _count(self) -> tuple[list[int], list[int]]:
        """Return how often each tensor has been written to."""
        return count_all_writes(self._inputs), count_all_writes(self._weights)

    def check(self) -> None:
        """Raise if any of them has been written to since.

        Raises:
            ESAMRuntimeError: the batch or the weights have changed.
        """
        found = _tensors_of(self._batch)  # not all containers can be copied, such as queues
        if len(found) != len(self._inputs) or any(map(operator.is_not, found, self._inputs)):
            raise ESAMRuntimeError(_changed("batch", "a batch with other tensors"))
        now = self._count()
        for name, before, after in zip(("batch", "weights"), self._writes, now, strict=True):
            if before != after:
                raise ESAMRuntimeError(_changed(name, f"{name} that were written to in place"))


def _changed(name: str, received: str) -> str:
    """Return the error message for what has changed between a loss and its backward."""
    return (
        f"The {name} must not change between optimizer.loss(...) and the backward of this loss, "
        "which runs the other passes of the step. Call the backward first, or compute the loss "
        f"again. Received: {received}."
    )


def _tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors in a batch and in containers of any library, except parameters."""
    args, kwargs = batch
    return [t for t in tensors_inside((*args, *kwargs.values())) if can_be_written(t)]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same elements; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def copy_tensors(batch: Batch) -> Batch:
    """Return the batch with copies of its tensors, for a forward that is not a pass of a step."""

    def copy_tensor(x: Any, _: str) -> Any:
        if is_tensor_collection(x) or (is_object_of_samples(x) and defines(x, "clone")):
            trained = any(t.requires_grad for t in tensors_inside(x))
            return x if trained else x.clone()
        return x.detach().clone() if type(x) is Tensor and not x.requires_grad else INSIDE

    with torch.no_grad():
        found: Batch = map_values(batch, copy_tensor, strict=False)
    return found
