"""Batches and their samples: the arguments of `losses`, whole or in part."""

import copy
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.containers import (
    INSIDE,
    NestedTooDeepError,
    is_container,
    is_list,
    is_object_of_samples,
    is_tensor_collection,
    map_values,
)
from esam_torch.entries import Index, describe, entries, items
from esam_torch.functions import code_of
from esam_torch.lookups import length_of
from esam_torch.marks import WAYS_OUT, Mark, Rows, Whole
from esam_torch.reading import Reader, Reading, refuse_used_up

__all__ = ["Batch", "Samples", "is_marked", "row_counts"]

#: The arguments of `losses`: positional and keyword arguments.
Batch = tuple[tuple[Any, ...], Mapping[str, Any]]


class Samples:
    """Takes samples out of batches.

    Args:
        take: the user's own function, or None (default). It is called as take(batch, indices), with
            the tuple of positional arguments of `losses` and a (k,) tensor of indices. It returns
            the tuple of arguments for those samples. If `losses` has keyword arguments too, it is
            called as take(batch, indices, **kwargs) and returns the tuple and a dictionary.

    Raises:
        ESAMTypeError: `take` is not callable.

    Example:
        >>> samples = Samples()
        >>> batch = (torch.tensor([1.0, 2.0, 3.0]), ["one", "two", "three"]), {}
        >>> samples.check(batch, 3)
        >>> samples.take(batch, torch.tensor([0, 2]), 3)
        ((tensor([1., 3.]), ['one', 'three']), {})
    """

    def __init__(self, take: Callable[..., Any] | None = None) -> None:
        if take is not None and not callable(take):
            raise ESAMTypeError(
                "`take` must be a function of a batch and indices that returns the selected "
                f"samples. Received: {type(take).__name__}."
            )
        self._take = take
        self._readings: dict[tuple[str, str], Reading] = {}
        self._of: dict[Hashable, Samples] = {}

    def of(self, losses: Callable[..., Any], batch: Batch) -> "Samples":
        """Return the samples of one function, whose readings are remembered separately.

        The arguments of other functions, or other numbers of arguments, have other places.
        """
        args, kwargs = batch
        key = (code_of(losses), len(args), *sorted(kwargs))
        if key not in self._of:
            self._of[key] = Samples(self._take)
        return self._of[key]

    def __getstate__(self) -> dict[str, Any]:
        # A copy reads its batches again, because code cannot be pickled.
        return {**self.__dict__, "_of": {}}

    def own(self, batch: Batch) -> Batch:
        """Return the batch with containers that nothing outside changes: copies, if possible."""
        return batch if _is_plain(batch) else _each(batch, _copy, endless=True, fresh=True)

    def bare(self, batch: Batch) -> Batch:
        """Return the batch as `losses` receives it in one pass, without `Rows` and `Whole`.

        Containers are copies, so that each pass finds what the user has put into them.

        Raises:
            ESAMTypeError: a pass would use up a value.
        """
        return batch if _is_plain(batch) else _each(batch, _unwrap, endless=True, fresh=True)

    def check(self, batch: Batch, b: int) -> None:
        """Raise if it is not certain how to take samples from a batch.

        Called when fewer than b samples are selected. The findings are remembered: an ambiguous
        value is read as in earlier batches.

        Args:
            batch: the arguments of `losses`.
            b: the number of losses, at least 2.

        Raises:
            ESAMTypeError: a value cannot be split by sample, or it is not certain how.
            ESAMValueError: nothing in the batch has an entry for each of the b samples, or a value
                that must have one per sample does not.
        """
        if self._take is not None:
            return
        reader = self._read(batch, b)
        if not reader.apart:
            raise ESAMValueError(_no_samples_message(reader))
        if reader.learned:  # a new kind of batch: find errors before the descent pass
            reader = Reader(b, {**self._readings, **reader.learned})
            _each(
                batch,
                functools.partial(_take_value, reader, Index(torch.tensor([0, 1], device="cpu"))),
            )
            self._readings = {**self._readings, **reader.before}

    def size(self, batch: Batch) -> int | None:
        """Return the number of samples in a batch, or None if it is not certain.

        It is certain, before `losses` is called, if a value is marked with `Rows`, or if the values
        in the places where an earlier batch had its samples agree.
        """
        found: set[int] = set()

        def visit(x: Any, path: str) -> Any:
            if isinstance(x, Rows):
                found.update(_lengths(x.value, path))
                return x
            if isinstance(x, Whole):
                return x
            kinds = ("table", "list", "object")
            read = [self._readings[path, kind] for kind in kinds if (path, kind) in self._readings]
            if Reading.ROWS in read or Reading.ITEMS in read:
                length = length_of(x)
                if length is not None:  # an optional argument may be None now
                    found.add(length)
            return x if read and Reading.PARTS not in read else INSIDE

        _each(batch, visit)
        return found.pop() if len(found) == 1 else None

    def take(self, batch: Batch, indices: Tensor, b: int) -> Batch:
        """Return the selected samples of a batch that `check` has accepted.

        Args:
            batch: the arguments of `losses`.
            indices: (k,) ascending indices, on any device.
            b: the number of samples in the batch.

        Raises:
            ESAMTypeError: a value cannot be indexed, or the user's `take` did not return arguments.
        """
        if self._take is not None:
            return _take_by(self._take, self.bare(batch), indices)
        reader = Reader(b, self._readings)
        taken = functools.partial(_take_value, reader, Index(indices))
        return self.own(_each(batch, taken))

    def note(self, batch: Batch, k: int, b: int) -> str:
        """Return a note for errors raised in a pass on k of b samples."""
        advice = "" if self._take is not None else f" If that is wrong: {WAYS_OUT}"
        split = self.describe(batch, b)
        return f"This was one of ESAM's passes on {k} of {b} samples. {split}{advice}"

    def describe(self, batch: Batch, b: int) -> str:
        """Return what is split by sample in a batch, and what is not, in a sentence or two."""
        if self._take is not None:
            return "The samples were selected by your `take`."
        reader = self._read(batch, b)
        apart, whole = (_list_values(values) for values in (reader.apart, reader.whole))
        return f"Split by sample: {apart}. Passed whole: {whole}."

    def _read(self, batch: Batch, b: int) -> Reader:
        """Return a reader that has read the whole batch."""
        reader = Reader(b, self._readings)
        _each(batch, functools.partial(_take_value, reader, None))
        return reader


def _lengths(x: Any, path: str) -> list[int]:
    """Return the lengths of all values inside one that is marked with `Rows`."""
    found: list[int] = []

    def visit(value: Any, _: str) -> Any:
        if is_container(value) and not is_list(value):
            return INSIDE
        length = length_of(value)
        if length is not None:
            found.append(length)
        return value

    map_values(x, visit, path, strict=False)
    return found


def _each(
    batch: Batch,
    visit: Callable[[Any, str], Any],
    *,
    endless: bool = False,
    fresh: bool = False,
) -> Batch:
    """Return the arguments, with each value inside them replaced by the result of `visit`.

    Args:
        batch: the arguments.
        visit: as in `map_values`.
        endless: whether an argument that contains itself is kept as it is. If not, it is an error.
        fresh: as in `map_values`.
    """

    def new(x: Any, path: str) -> Any:
        try:
            return map_values(x, visit, path, fresh=fresh)
        except NestedTooDeepError:
            if endless:
                return x
            raise

    args, kwargs = batch
    return (
        tuple(new(x, f"batch[{i}]") for i, x in enumerate(args)),
        {name: new(x, name) for name, x in kwargs.items()},
    )


def row_counts(batch: Batch) -> set[int]:
    """Return the lengths of the tensors in a batch that may have one row per sample."""
    found: set[int] = set()

    def visit(x: Any, _: str) -> Any:
        if isinstance(x, Tensor) and x.dim():
            found.add(len(x))
        return x if isinstance(x, Tensor | Whole) else INSIDE

    _each(batch, visit, endless=True)
    return found


def is_marked(batch: Batch) -> bool:
    """Return whether all arguments are marked with `Rows` or `Whole`."""
    args, kwargs = batch
    return all(isinstance(x, Mark) for x in (*args, *kwargs.values()))


def _is_plain(batch: Batch) -> bool:
    """Return whether a batch consists of positional tensors."""
    args, kwargs = batch
    return not kwargs and all(type(x) is Tensor for x in args)


def _copy(x: Any, _: str = "") -> Any:
    """Return a shallow copy of another library's batch, and what `Rows` or `Whole` marks copied."""
    if isinstance(x, Mark):
        return type(x)(_copy_inside(x.value))
    if is_tensor_collection(x):
        return x.clone(recurse=False)
    return copy.copy(x) if is_object_of_samples(x) else INSIDE


def _copy_inside(x: Any) -> Any:
    """Return a value with copies of its containers; one that contains itself is kept."""
    try:
        return map_values(x, _copy, fresh=True)
    except NestedTooDeepError:
        return x


def _unwrap(x: Any, path: str) -> Any:
    """Return what `_copy` does, without `Rows` or `Whole`."""
    if isinstance(x, Mark):
        return _copy_inside(x.value)
    refuse_used_up(x, path)
    return _copy(x)


def _take_value(
    reader: Reader, index: Index | None, x: Any, path: str, declared: bool = False
) -> Any:
    """Return the selected samples of a value, or INSIDE to visit its parts.

    Args:
        reader: determines how the value is read.
        index: which samples, or None to only read the value and return it unchanged.
        x: the value.
        path: its place in the batch.
        declared: whether it is wrapped in `Rows`.
    """
    if isinstance(x, Whole):
        reader.whole.append((path, x))
        return x.value
    if isinstance(x, Rows):
        return map_values(
            x.value, functools.partial(_take_value, reader, index, declared=True), path
        )
    reading = reader.read(x, path, declared=declared)
    if reading is Reading.PARTS:
        return INSIDE
    if index is None or reading is Reading.WHOLE:
        return x
    try:
        return items(x, index) if reading is Reading.ITEMS else entries(x, index)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # another library's object may raise anything
        raise ESAMTypeError(
            f"`{path}` must be a value that can be indexed by sample. Received: {describe(x)}, "
            f"which raised: {error} {WAYS_OUT}"
        ) from error


def _take_by(take: Callable[..., Any], batch: Batch, indices: Tensor) -> Batch:
    """Return the samples that the user's own function selects."""
    args, kwargs = batch
    found = take(args, indices, **kwargs)
    chosen, named = (
        found if kwargs and isinstance(found, tuple) and len(found) == 2 else (found, {})
    )
    if not isinstance(chosen, tuple) or len(chosen) != len(args) or set(named) != set(kwargs):
        wanted = f"a tuple of {len(args)} arguments of `losses`"
        more = f", and a dictionary with {sorted(kwargs)}" if kwargs else ""
        raise ESAMTypeError(f"`take` must return {wanted}{more}. Received: {describe(found)}.")
    return chosen, named


def _list_values(values: list[tuple[str, Any]]) -> str:
    """Return a list of places and kinds of values in one line."""
    return ", ".join(f"{path} ({describe(x)})" for path, x in values[:12]) or "nothing"


def _no_samples_message(reader: Reader) -> str:
    """Return the error message for a batch in which nothing has b entries."""
    sizes = {len(x) for _, x in reader.whole if isinstance(x, Tensor) and x.dim()}
    ratios = [(size, reader.b // size) for size in sizes if size > 1 and reader.b % size == 0]
    hint = ""
    if len(ratios) == 1:
        size, times = ratios[0]
        hint = (
            f" If there are {size} samples with {times} losses each: "
            f"`losses.reshape({size}, {times}).mean(1)`."
        )
    return (
        "`losses` must return one loss per sample, and the batch must contain the samples, so that "
        f"some can be selected.{hint} {WAYS_OUT} With gamma=1.0 and without ascend=Part(...), all "
        "samples are used. Received: "
        f"{reader.b} losses, and in the batch: {_list_values(reader.whole)}."
    )
