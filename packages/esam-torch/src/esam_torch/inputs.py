"""Protection of the batch: every pass of a step must read the same values."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
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
    own_objects_inside,
    tensors_inside,
)
from esam_torch.lookups import defines
from esam_torch.losses import LossFunction
from esam_torch.marks import Mark
from esam_torch.objects import Objects, arrays_of
from esam_torch.values import can_be_written

__all__ = ["Unwritten", "call_apart", "changed", "copied", "read_only"]


def read_only(losses: LossFunction, batch: Batch, *, watched: bool) -> LossFunction:
    """Return `losses` for the passes of one step, which must not change the batch repeatedly.

    Writing the same values again is allowed, such as `labels[labels < 0] = 0`. Each pass reads the
    attributes of objects as the first one did, and the variables that `losses` assigns.

    Args:
        losses: the user's function.
        batch: its arguments. Selected samples are copies, and may be written to unless the batch
            itself was.
        watched: whether NumPy arrays are compared too. They count no writes.

    Raises:
        ESAMRuntimeError: (when called) a pass after the first changed the batch in place.
    """
    own = {id(x) for x in (*_tensors_of(batch), *(_arrays_of(batch) if watched else ()))}
    written = False
    objects: Objects | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal objects
        if objects is None:
            objects = Objects(batch, losses)
            return call_and_compare(*args, **kwargs)
        with objects.rewinding():
            return call_and_compare(*args, **kwargs)

    def call_and_compare(*args: Any, **kwargs: Any) -> Any:
        nonlocal written
        tensors = _tensors_of((args, kwargs))
        arrays = _arrays_of((args, kwargs)) if watched else []
        versions = count_all_writes(tensors)
        copies = [t.detach().clone() for t in tensors] if written else None
        images = [a.tobytes() for a in arrays]
        found = losses(*args, **kwargs)
        now = count_all_writes(tensors)
        touched = [t for t, n, m in zip(tensors, versions, now, strict=True) if n != m]
        others = [a for a, i in zip(arrays, images, strict=True) if a.tobytes() != i]
        if touched and copies is not None:
            for tensor, copy in zip(tensors, copies, strict=True):
                if not _equal(tensor.detach(), copy):
                    raise ESAMRuntimeError(_written("a tensor", tensor))
        if others and written:
            raise ESAMRuntimeError(_written("an array", others[0]))
        written = written or any(id(x) in own for x in (*touched, *others))
        return found

    return call


def _written(what: str, x: Any) -> str:
    """Return the error message for a value that each pass changes in place."""
    return (
        "`losses` must not change its batch in place, because every pass of a step reads it. "
        f"Received: {what} of shape {tuple(x.shape)} that each pass changed again. Use operations "
        "that return new values (`x = x.sub(mean)` and not `x.sub_(mean)`), or change the batch "
        "before the step."
    )


class Unwritten:
    """The batch and the weights between a loss and its backward, whose passes read them again.

    Args:
        batch: arguments of `losses`.
        weights: the trained weights.
        again: whether passes follow that read the batch; if not, only the graph reads its tensors.
        watched: whether NumPy arrays are compared too. They count no writes.
    """

    def __init__(
        self, batch: Batch, weights: Sequence[Tensor], *, again: bool, watched: bool
    ) -> None:
        self._batch = batch if again else None
        self._inputs = _tensors_of(batch)
        self._images = [(a, a.tobytes()) for a in _arrays_of(batch)] if again and watched else []
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
        # Not all containers can be copied, such as queues.
        found = self._inputs if self._batch is None else _tensors_of(self._batch)
        if not self._are_inputs(found) and not self._are_inputs(self._without_new(found)):
            raise ESAMRuntimeError(changed("batch", "a batch with other tensors"))
        if any(array.tobytes() != image for array, image in self._images):
            raise ESAMRuntimeError(changed("batch", "an array that was written to in place"))
        now = self._count()
        for name, before, after in zip(("batch", "weights"), self._writes, now, strict=True):
            if before != after:
                raise ESAMRuntimeError(changed(name, f"{name} that were written to in place"))

    def _are_inputs(self, found: Sequence[Tensor]) -> bool:
        """Return whether these are the batch's tensors."""
        return len(found) == len(self._inputs) and all(map(operator.is_, found, self._inputs))

    def _without_new(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors without those in new attributes of objects, which no pass finds."""
        known = {id(t) for t in self._inputs}
        objects = own_objects_inside(self._batch)
        new = {id(t) for x in objects for t in tensors_inside(x)} - known
        return [t for t in found if id(t) not in new]


def changed(name: str, received: str) -> str:
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


def _arrays_of(batch: Batch) -> list[Any]:
    """Return the NumPy arrays in a batch."""
    found = [a for x in own_objects_inside(batch) for a in arrays_of(x)]

    def visit(x: Any, _: str) -> Any:
        if isinstance(x, np.ndarray):
            found.append(x)
        return INSIDE

    map_values(batch, visit, strict=False)
    return found


def copied(batch: Batch) -> Batch:
    """Return the batch with copies of its tensors and arrays, which a forward may write to."""

    def copy_values(x: Any, _: str) -> Any:
        if isinstance(x, Mark):
            return type(x)(map_values(x.value, copy_values, strict=False))
        if is_tensor_collection(x) or (is_object_of_samples(x) and defines(x, "clone")):
            trained = any(t.requires_grad for t in tensors_inside(x))
            return x if trained else x.clone()
        if type(x) is np.ndarray:
            return x.copy()
        return x.detach().clone() if type(x) is Tensor and not x.requires_grad else INSIDE

    with torch.no_grad():
        args, kwargs = map_values(batch, copy_values, strict=False)
    return args, kwargs


def call_apart(losses: LossFunction, batch: Batch) -> Any:
    """Return the result of a forward that is no pass of a step and does not change the batch."""
    args, kwargs = copied(batch)
    with Objects(batch, losses).undoing():
        return losses(*args, **kwargs)
