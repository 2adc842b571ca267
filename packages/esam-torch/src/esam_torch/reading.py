"""How each value of a batch is read: as one entry per sample, as a container, or as a whole.

Samples are declared or certain. In a tensor with one row per sample the rows are samples, in a list
with one item per sample the items. An ambiguous value is read as in earlier batches, which usually
had another size; without those it is an error.
"""

import enum
import functools
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Number
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.containers import is_container, is_list, is_tensor_collection, parts
from esam_torch.entries import describe
from esam_torch.lookups import attribute, length_of
from esam_torch.marks import WAYS_OUT, Mark

__all__ = ["Reader", "Reading", "refuse_used_up"]

#: A list of up to this many numbers may contain sizes or coefficients instead of one number per
#: sample; a list of up to this many tensors may be a record of different values.
_SHORT = 4

#: Types that contain no samples, for any length.
_PLAIN = (
    *(type(None), Number, str, bytes, type, AbstractSet, np.generic, enum.Enum),
    *(torch.Size, torch.dtype, torch.device, torch.Generator, nn.Module),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
)

#: Types whose objects give other values each time.
_USED_UP = (
    *(Iterator, torch.Generator, random.Random),
    *(np.random.Generator, np.random.RandomState),
)


class Reading(enum.Enum):
    """One way to read a value."""

    ROWS = "one row or entry per sample"
    ITEMS = "one item per sample"
    PARTS = "a container, whose parts are read one by one"
    WHOLE = "the same for all samples"


def refuse_used_up(x: Any, path: str) -> None:
    """Raise if a value gives each pass other values: an iterator or a random generator."""
    if isinstance(x, _USED_UP):
        why = (
            "can be read only once, but `losses` is called several times. Use a list."
            if isinstance(x, Iterator)
            else "gives each call of `losses` other numbers, but all passes of a step need the "
            "same. Use the global generator, whose state is restored."
        )
        raise ESAMTypeError(f"`{path}` {why} Received: {type(x).__name__}.")


class Reader:
    """Reads the values of one batch.

    Args:
        b: the number of samples.
        before: how values were read in earlier batches, by place and kind.

    Attributes:
        learned: the readings that this batch adds.
        apart: (place, value) of all values with one entry per sample.
        whole: (place, value) of all values that are the same for all samples.
    """

    def __init__(self, b: int, before: Mapping[tuple[str, str], Reading]) -> None:
        self.b = b
        self.before = before
        self.learned: dict[tuple[str, str], Reading] = {}
        self.apart: list[tuple[str, Any]] = []
        self.whole: list[tuple[str, Any]] = []

    def read(self, x: Any, path: str, *, declared: bool = False) -> Reading:
        """Return how a value is read.

        Args:
            x: the value, not marked.
            path: its place in the batch.
            declared: whether the user has wrapped it in `Rows`.

        Raises:
            ESAMTypeError: it is ambiguous, or cannot be indexed by sample.
            ESAMValueError: it has the wrong number of entries.
        """
        found = self._read_declared(x, path) if declared else self._found(x, path)
        if found in (Reading.ROWS, Reading.ITEMS):
            self.apart.append((path, x))
        elif found is Reading.WHOLE:
            self.whole.append((path, x))
        return found

    def _found(self, x: Any, path: str) -> Reading:
        """Return how an unmarked value is read."""
        if isinstance(x, Tensor | np.ndarray):
            return self._table(x, path)
        if isinstance(x, PackedSequence):
            self._refuse_ragged(x, path)
        if isinstance(x, _PLAIN):
            return Reading.WHOLE
        if is_list(x):
            return self._list(x, path)
        if is_tensor_collection(x):
            return self._collection(x, path)
        if is_container(x):
            return Reading.PARTS
        return self._object(x, path)

    def _read_declared(self, x: Any, path: str) -> Reading:
        """Return how a value marked with `Rows` is read."""
        if x is None:
            return Reading.WHOLE
        if isinstance(x, PackedSequence) or attribute(x, "is_nested") is True:
            self._refuse_ragged(x, path)
        if is_container(x) and not is_list(x):
            return Reading.PARTS
        length = None if isinstance(x, _PLAIN) else length_of(x)
        if length != self.b:
            raise ESAMValueError(
                f"`{path}` must have one entry per sample, since it is marked with Rows. "
                f"Received: {describe(x)}, and {self.b} losses."
            )
        return Reading.ITEMS if is_list(x) else Reading.ROWS

    def _table(self, x: Any, path: str) -> Reading:
        """Return how a tensor or an array is read."""
        if getattr(x, "is_nested", False):
            self._refuse_ragged(x, path)
        length = len(x) if x.ndim else 1
        if length == 1:  # not one row per sample: broadcasting uses it for all samples
            return Reading.WHOLE
        before = self.before.get((path, "table"))
        if before is Reading.ROWS and length != self.b:
            self._refuse_changed(x, path)
        if before is not None:
            return before
        if length != self.b:
            return self._learn(path, "table", Reading.WHOLE)
        if isinstance(x, nn.Parameter):
            self._refuse_ambiguous(x, path, "one row per sample", "a parameter for all samples")
        return self._learn(path, "table", Reading.ROWS)

    def _list(self, x: Sequence[Any], path: str) -> Reading:
        """Return how a list or a tuple is read."""
        if any(isinstance(item, Mark) for item in x):
            return Reading.PARTS
        if len(x) < 2:
            return Reading.PARTS
        before = self.before.get((path, "list"))
        if before is Reading.ITEMS and len(x) != self.b:
            self._refuse_changed(x, path)
        if before is not None:
            return before
        found = self._list_of_b if len(x) == self.b else self._list_of_others
        return self._learn(path, "list", found(x, path))

    def _list_of_b(self, x: Sequence[Any], path: str) -> Reading:
        """Return how a list with as many items as there are samples is read.

        The items of a list of samples have the same kind. If each of them has b rows, the list may
        also be a container of tensors with one row per sample. If only some have, and the items
        have different kinds, it may be a record.
        """
        known = [item for item in x if item is not None]
        if len(x) <= _SHORT and known and all(_is_number(item) for item in known):
            self._refuse_ambiguous(x, path, "one number per sample", "numbers for all samples")
        rows = [self._holds_rows(item) for item in known]
        if all(rows) and known and not _alike(known):
            return Reading.PARTS
        if any(rows) and (all(rows) or not _alike(known)):
            self._refuse_ambiguous(
                x, path, "one item per sample", "a container of values with one row per sample"
            )
        return Reading.ITEMS

    def _list_of_others(self, x: Sequence[Any], path: str) -> Reading:
        """Return how a list with more or fewer items than there are samples is read."""
        if not all(isinstance(item, Tensor | np.ndarray) and item.ndim for item in x):
            return Reading.PARTS
        rows = [self._holds_rows(item) for item in x]
        if not any(rows):
            return Reading.WHOLE
        if len(x) > _SHORT and not all(rows) and _alike(x):
            one = f"{sum(rows)} of its tensors have one row per sample"
            self._refuse_ambiguous(x, path, one, "tensors of different lengths for all samples")
        return Reading.PARTS

    def _collection(self, x: Any, path: str) -> Reading:
        """Return how a TensorDict or a tensorclass is read: by its own batch size."""
        size = x.batch_size
        before = self.before.get((path, "object"))
        length = size[0] if size else 1
        if before is Reading.ROWS and length != self.b:
            self._refuse_changed(x, path)
        if before is not None:
            return before
        if length == self.b:
            return self._learn(path, "object", Reading.ROWS)
        if not size and any(self._holds_rows(value) for value in x.values(True, True)):
            raise ESAMTypeError(
                f"`{path}` must have a batch size, so that samples can be selected from it: "
                f"batch_size=[{self.b}]. Received: a {type(x).__name__} with batch_size=[]."
            )
        return Reading.WHOLE if not size else self._learn(path, "object", Reading.WHOLE)

    def _object(self, x: Any, path: str) -> Reading:
        """Return how a value of an unknown type is read."""
        refuse_used_up(x, path)
        length = length_of(x)
        before = self.before.get((path, "object"))
        if before is Reading.ROWS and length != self.b:
            self._refuse_changed(x, path)
        if before is not None:
            return before
        if length == self.b:
            return self._learn(path, "object", Reading.ROWS)
        within = self._rows_within(x)
        if within is not None:
            raise ESAMTypeError(
                f"`{path}` seems to contain samples, in `{within}`, but cannot be split. "
                f"{WAYS_OUT} Received: {describe(x)}, and {self.b} losses."
            )
        return self._learn(path, "object", Reading.WHOLE)

    # -- looking for rows -------------------------------------------------------------------------

    def _holds_rows(self, x: Any, *, lists: bool = True, depth: int = 8) -> bool:
        """Return whether a value has b rows, or contains one that has.

        Args:
            x: anything.
            lists: whether a list of length b also counts.
            depth: the maximum depth to search.
        """
        if isinstance(x, Tensor | np.ndarray):
            return bool(x.ndim) and len(x) == self.b
        if isinstance(x, _PLAIN):
            return False
        if is_tensor_collection(x):
            return bool(x.batch_size[:1] == (self.b,))
        if lists and is_list(x) and len(x) == self.b:
            return True
        return depth > 0 and any(
            self._holds_rows(value, lists=lists, depth=depth - 1) for _, value in parts(x) or ()
        )

    def _rows_within(self, x: Any, depth: int = 3) -> str | None:
        """Return the name of an attribute of an object that is or holds a tensor with b rows."""
        values: dict[str, Any] = {}
        for slots in (getattr(cls, "__slots__", ()) for cls in type(x).__mro__):
            names = (slots,) if isinstance(slots, str) else slots
            values |= {name: attribute(x, name) for name in names}
        values.update(attribute(x, "__dict__", {}))
        for name, value in values.items():
            if isinstance(value, (nn.Parameter, *_PLAIN)):
                continue
            if self._holds_rows(value, lists=False):
                return name
            within = self._rows_within(value, depth - 1) if depth else None
            if within is not None:
                return f"{name}.{within}"
        return None

    # -- remembering and refusing -----------------------------------------------------------------

    def _learn(self, path: str, kind: str, reading: Reading) -> Reading:
        """Return a reading, and remember it for later batches."""
        self.learned[path, kind] = reading
        return reading

    def _refuse_ambiguous(self, x: Any, path: str, one: str, other: str) -> NoReturn:
        """Raise for an ambiguous value."""
        raise ESAMTypeError(
            f"`{path}` is ambiguous: {one}, or {other}. {WAYS_OUT} "
            f"Received: {describe(x)}, and {self.b} losses."
        )

    def _refuse_changed(self, x: Any, path: str) -> NoReturn:
        """Raise for a value that had one entry per sample in an earlier batch, but has not now."""
        raise ESAMValueError(
            f"`{path}` had one entry per sample in an earlier batch, and must have one now. If "
            f"that was a coincidence: {WAYS_OUT} Received: {describe(x)}, and {self.b} losses."
        )

    def _refuse_ragged(self, x: Any, path: str) -> NoReturn:
        """Raise for a value with sequences of different lengths in one tensor."""
        raise ESAMTypeError(
            f"`{path}` must contain samples that can be indexed. Received: a "
            f"{type(x).__name__}. Pass the padded tensor and the lengths, and pack or nest them "
            "within `losses`; or pass take=function(batch, indices) to ESAM."
        )


def _is_number(x: Any) -> bool:
    """Return whether a value is a number, or a 0-d tensor or array."""
    return isinstance(x, Number | np.generic) or (
        isinstance(x, Tensor | np.ndarray) and x.ndim == 0
    )


def _alike(values: Sequence[Any]) -> bool:
    """Return whether values have the same kind: the same type and, for tensors, dtype and rank."""
    tables = Tensor | np.ndarray
    return (
        len({(type(x), *((x.dtype, x.ndim) if isinstance(x, tables) else ())) for x in values}) < 2
    )
