"""The samples of a batch: what `losses` is given, whole or in part."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.containers import INSIDE, NestedTooDeepError, is_container, is_record, map_values
from esam_torch.entries import Index, described, entries, items
from esam_torch.marks import WAYS_OUT, Rows, Whole
from esam_torch.reading import Reader, Reading

__all__ = ["Batch", "Samples"]

#: The arguments of `losses`: positional ones, and those by keyword.
Batch = tuple[tuple[Any, ...], Mapping[str, Any]]


class Samples:
    """Takes samples out of batches.

    Args:
        take: the user's own function, or None (default). It is called as take(batch, indices) with
            the tuple of positional arguments of `losses` and a (k,) tensor of indices, and returns
            the tuple of arguments for those samples. Where `losses` has keyword arguments too, it
            is called as take(batch, indices, **kwargs) and returns the tuple and a dictionary.

    Raises:
        ESAMTypeError: `take` cannot be called.

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

    def bare(self, batch: Batch) -> Batch:
        """Return the batch as `losses` gets it: `Rows` and `Whole` replaced by their values."""
        args, kwargs = batch
        if not kwargs and all(type(x) is Tensor for x in args):
            return batch
        return _each(batch, _unmarked, endless=True)

    def check(self, batch: Batch, b: int) -> None:
        """Refuse a batch from which samples cannot be taken with certainty.

        To be called where fewer than b are selected. What is found out is remembered: a value that
        can be read in two ways is read as in the batches before.

        Args:
            batch: the arguments of `losses`.
            b: the number of losses, at least 2.

        Raises:
            ESAMTypeError: a value that cannot be taken apart, or not with certainty.
            ESAMValueError: nothing in the batch has an entry for each of the b samples, or what
                must have has not.
        """
        if self._take is not None:
            return
        reader = self._read(batch, b)
        if not reader.apart:
            raise ESAMValueError(_nothing_to_take(reader))
        if reader.learned:  # a new kind of batch: what cannot be done is refused before the descent
            reader = Reader(b, {**self._readings, **reader.learned})
            _each(batch, functools.partial(_taken, reader, Index(torch.tensor([0, 1]))))
            self._readings = {**self._readings, **reader.before}

    def size(self, batch: Batch) -> int | None:
        """Return how many samples a batch holds, where that is certain before `losses` is called.

        It is where a value is marked with `Rows`, and where values in the places that held the
        samples of an earlier batch agree. Else None.
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
                found.add(len(x))
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
            ESAMTypeError: a value cannot be indexed, or the user's `take` returned something else
                than arguments.
        """
        if self._take is not None:
            return _taken_by(self._take, self.bare(batch), indices)
        reader = Reader(b, self._readings)
        return _each(batch, functools.partial(_taken, reader, Index(indices)))

    def note(self, batch: Batch, k: int, b: int) -> str:
        """Return what to say beside an error that comes in the descent on k of b samples."""
        start = f"This was ESAM's descent pass, on {k} of {b} samples. "
        if self._take is not None:
            return start + "They were taken by your `take`."
        reader = self._read(batch, b)
        apart, whole = (_listed(values) for values in (reader.apart, reader.whole))
        return f"{start}Taken apart: {apart}. Whole: {whole}. If that is wrong: {WAYS_OUT}"

    def _read(self, batch: Batch, b: int) -> Reader:
        """Return a reader that has read the whole batch."""
        reader = Reader(b, self._readings)
        _each(batch, functools.partial(_taken, reader, None))
        return reader


def _lengths(x: Any, path: str) -> list[int]:
    """Return the lengths of all that is in a value marked with `Rows`."""
    found: list[int] = []

    def visit(value: Any, _: str) -> Any:
        simple = isinstance(value, list | tuple) and not is_record(value)
        if is_container(value) and not simple:
            return INSIDE
        if hasattr(value, "__len__"):
            found.append(len(value))
        return value

    map_values(x, visit, path, strict=False)
    return found


def _each(batch: Batch, visit: Callable[[Any, str], Any], *, endless: bool = False) -> Batch:
    """Return the arguments with what `visit` puts in the place of each value inside them.

    Args:
        batch: the arguments.
        visit: as in `map_values`.
        endless: whether an argument that holds itself stays as it is. If not, it is refused.
    """

    def new(x: Any, path: str) -> Any:
        try:
            return map_values(x, visit, path)
        except NestedTooDeepError:
            if endless:
                return x
            raise

    args, kwargs = batch
    return (
        tuple(new(x, f"batch[{i}]") for i, x in enumerate(args)),
        {name: new(x, name) for name, x in kwargs.items()},
    )


def _unmarked(x: Any, _: str) -> Any:
    """Return the value of what is marked."""
    return x.value if isinstance(x, Rows | Whole) else INSIDE


def _taken(reader: Reader, index: Index | None, x: Any, path: str, declared: bool = False) -> Any:
    """Return what comes in the place of a value where samples are taken, or INSIDE.

    Args:
        reader: says how the value is read.
        index: which samples, or None to read only: the value itself is returned then.
        x: the value.
        path: its place.
        declared: whether `Rows` has been written around it.
    """
    if isinstance(x, Whole):
        reader.whole.append((path, x))
        return x.value
    if isinstance(x, Rows):
        return map_values(x.value, functools.partial(_taken, reader, index, declared=True), path)
    reading = reader.read(x, path, declared=declared)
    if reading is Reading.PARTS:
        return INSIDE
    if index is None or reading is Reading.WHOLE:
        return x
    try:
        return items(x, index) if reading is Reading.ITEMS else entries(x, index)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever another library's object raises
        raise ESAMTypeError(
            f"`{path}` must be something that samples can be taken from. Received: {described(x)}, "
            f"with which it was: {error} {WAYS_OUT}"
        ) from error


def _taken_by(take: Callable[..., Any], batch: Batch, indices: Tensor) -> Batch:
    """Return the samples that the user's own function takes."""
    args, kwargs = batch
    found = take(args, indices, **kwargs)
    chosen, named = (
        found if kwargs and isinstance(found, tuple) and len(found) == 2 else (found, {})
    )
    if not isinstance(chosen, tuple) or len(chosen) != len(args) or set(named) != set(kwargs):
        wanted = f"a tuple of {len(args)} arguments of `losses`"
        more = f", and a dictionary with {sorted(kwargs)}" if kwargs else ""
        raise ESAMTypeError(f"`take` must return {wanted}{more}. Received: {described(found)}.")
    return chosen, named


def _listed(values: list[tuple[str, Any]]) -> str:
    """Return places and kinds of values in one line."""
    return ", ".join(f"{path} ({described(x)})" for path, x in values[:12]) or "nothing"


def _nothing_to_take(reader: Reader) -> str:
    """Return the message for a batch without anything that has b entries."""
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
        "`losses` must return one loss per sample, and the batch must hold the samples, so that "
        f"some can be selected.{hint} {WAYS_OUT} With gamma=1.0 nothing is selected. "
        f"Received: {reader.b} losses, and in the batch: {_listed(reader.whole)}."
    )
