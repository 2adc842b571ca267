"""Samples in batches: every kind of value is read correctly, or is an error."""

import collections
import dataclasses
import enum
import types
from collections import OrderedDict, UserDict, deque
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests.torch.batches import Holder, SharedStore, packed, table
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch import Rows, Whole
from esam_torch.batch import Samples

WAYS_OUT = r"Rows\(x\).*Whole\(x\).*take=function\(batch, indices\)"
CHOSEN = torch.tensor([1, 3])


def first(x):
    """Return the batch for a function of one argument."""
    return (x,), {}


def taken(x, b, indices=CHOSEN, samples=None):
    """Return the selected samples of a batch with one argument, which must not change."""
    samples = Samples() if samples is None else samples
    samples.check(first(x), b)
    (part,), named = samples.take(first(x), indices, b)
    assert not named
    return part


def same(a, b):
    """Require that two nested values are equal."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    elif isinstance(a, collections.abc.Mapping):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            same(left, right)
    elif dataclasses.is_dataclass(a):
        same(vars(a), vars(b))
    else:
        assert a == b


# -- values of every kind, with a tensor of 5 rows -----------------------------------------------


class Pair(NamedTuple):
    inputs: object
    more: object


@dataclasses.dataclass
class Record:
    inputs: object
    name: str = "one"


@dataclasses.dataclass(frozen=True)
class Frozen:
    inputs: object
    count: int = 3


class Encoding(UserDict):
    def __init__(self, data=None, source=None):
        super().__init__(data)
        self.source = source


class Kind(enum.Enum):
    ONE = "one"


class Shapeless:
    """An object without a length, like a PIL image."""

    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        return self.name == other.name

    __hash__ = None


RAGGED = [torch.ones(n, 4) for n in (3, 5, 2, 5, 1)]  # boxes per image; two have five
CASES = {
    "rows": (table(5, 2), table(5, 2)[CHOSEN]),
    "one number per sample": (table(5), torch.tensor([1.0, 3.0])),
    "an array": (np.arange(5), np.array([1, 3])),
    "a table of an array": (np.arange(10).reshape(5, 2), np.array([[2, 3], [6, 7]])),
    "words in an array": (np.array(list("abcde")), np.array(["b", "d"])),
    "objects in an array": (
        np.array(["a", None, {}, "d", 1], object),
        np.array([None, "d"], object),
    ),
    "captions": (list("abcde"), ["b", "d"]),
    "captions in a tuple": (tuple("abcde"), ("b", "d")),
    "labels in a list": ([0, 1, 2, 3, 4], [1, 3]),
    "labels in a tuple": ((0, 1, 2, 3, 4), (1, 3)),
    "numbers and None": ([0, None, 2, 3.5, 4], [None, 3.5]),
    "images of several sizes": (
        [torch.full((3, 2 + i, 2), i) for i in range(5)],
        [torch.full((3, 2 + i, 2), i) for i in (1, 3)],
    ),
    "images in a tuple": (
        tuple(torch.full((3, 2, 2), i) for i in range(5)),
        tuple(torch.full((3, 2, 2), i) for i in (1, 3)),
    ),
    "boxes": (RAGGED, [RAGGED[1], RAGGED[3]]),
    "targets of a detector": (
        [
            {"boxes": boxes, "labels": torch.full((len(boxes),), i)}
            for i, boxes in enumerate(RAGGED)
        ],
        [{"boxes": RAGGED[i], "labels": torch.full((len(RAGGED[i]),), i)} for i in (1, 3)],
    ),
    "tokens of several lengths": (
        [[1] * 3, [2] * 5, [3] * 2, [4] * 7, [5]],
        [[2] * 5, [4] * 7],
    ),
    "samples not collated": (
        [(torch.full((3, 2), i), i) for i in range(5)],
        [(torch.full((3, 2), i), i) for i in (1, 3)],
    ),
    "arrays of several lengths": (
        [np.full(i + 1, i) for i in range(5)],
        [np.full(i + 1, i) for i in (1, 3)],
    ),
    "objects": ([Shapeless(c) for c in "abcde"], [Shapeless("b"), Shapeless("d")]),
    "numbers of no dimension": (list(table(5)), [torch.tensor(1.0), torch.tensor(3.0)]),
    "a sparse table": (table(5, 2).to_sparse(), None),
    # -- containers ------------------------------------------------------------------------------
    "a pair": ([table(5, 2), table(5)], [table(5, 2)[CHOSEN], table(5)[CHOSEN]]),
    "a named tuple": (
        Pair(table(5), {"deep": list("abcde")}),
        Pair(table(5)[CHOSEN], {"deep": ["b", "d"]}),
    ),
    "a dictionary of lists": (
        {"caption": list("abcde"), "id": [0, 1, 2, 3, 4], "n": 5},
        {"caption": ["b", "d"], "id": [1, 3], "n": 5},
    ),
    "an ordered dictionary": (OrderedDict(x=table(5)), OrderedDict(x=table(5)[CHOSEN])),
    "a mapping with more": (
        Encoding({"x": table(5)}, source=list("abcde")),
        Encoding({"x": table(5)[CHOSEN]}, source=["b", "d"]),
    ),
    "a read-only mapping": (
        types.MappingProxyType({"x": table(5)}),
        types.MappingProxyType({"x": table(5)[CHOSEN]}),
    ),
    "a dataclass": (
        Record({"x": table(5), "y": np.arange(5)}),
        Record({"x": table(5)[CHOSEN], "y": np.array([1, 3])}),
    ),
    "a frozen dataclass": (Frozen(list("abcde")), Frozen(["b", "d"])),
    # -- values that are the same for all samples
    # ------------------------------------------------------------------
    "None": (None, None),
    "a number": (5, 5),
    "a word as long as the batch": ("abcde", "abcde"),
    "bytes": (b"abcde", b"abcde"),
    "a set": ({0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),
    "a shape": (torch.Size([1, 2, 3, 4, 5]), torch.Size([1, 2, 3, 4, 5])),
    "an enumeration": (Kind.ONE, Kind.ONE),
    "a type": (torch.float32, torch.float32),
    "class weights": (torch.ones(7), torch.ones(7)),
    "one row for all": (torch.ones(1, 4), torch.ones(1, 4)),
    "no dimension": (torch.tensor(2.0), torch.tensor(2.0)),
    "more words than samples": (list("abcdefg"), list("abcdefg")),
    "no words": ([], []),
    "anchors": ([torch.ones(n, 4) for n in (9, 4, 1)], [torch.ones(n, 4) for n in (9, 4, 1)]),
    "a size": ((224, 224), (224, 224)),
    "declared": ([Whole(table(5)), Rows(list("abcde"))], [table(5), ["b", "d"]]),
    "declared, inside": (
        Rows({"x": table(5), "y": {"z": tuple("abcde")}, "n": None}),
        {"x": table(5)[CHOSEN], "y": {"z": ("b", "d")}, "n": None},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_values_of_every_kind(kind):
    x, wanted = CASES[kind]
    samples, batch = Samples(), ((x, table(5)), {"more": x})
    before = repr(x)
    samples.check(batch, 5)
    (part, rows), named = samples.take(batch, CHOSEN, 5)
    assert torch.equal(rows, table(5)[CHOSEN])
    if kind == "a sparse table":
        part, wanted = part.to_dense(), x.to_dense()[CHOSEN]
        named = {"more": named["more"].to_dense()}
    same(part, wanted)
    same(named["more"], wanted)
    assert repr(x) == before


def test_values_for_all_samples_are_the_same_objects():
    model, things = nn.ModuleList([nn.Linear(1, 1)] * 5), {"a": [1, 2], "b": table(7)}
    samples, batch = Samples(), ((model, things, len, table(5)), {})
    samples.check(batch, 5)
    (a, b, c, _), _ = samples.take(batch, CHOSEN, 5)
    assert a is model and b["a"] == [1, 2] and b["b"] is things["b"] and c is len


# -- ambiguous values --------------------------------------------------------------------


def planes(n, b=3):
    """Return n images with b channels each, which are ambiguous if n is b."""
    return [torch.full((b, 4, 4), float(i)) for i in range(n)]


AMBIGUOUS = {
    "three images with three channels": (planes(3), 3),
    "two views of two samples": ([table(2, 4), table(2, 4) + 7], 2),
    "two dictionaries of two views": ([{"x": table(2)}, {"x": table(2)}], 2),
    "pairs of two texts": ([["a", "b"], ["c", "d"]], 2),
    "arrays": ([np.ones((3, 4))] * 3, 3),
    "a size": ((224, 224), 2),
    "coefficients": ([0.9, 0.1], 2),
    "coefficients as tensors": ([torch.tensor(0.9), torch.tensor(0.1)], 2),
    "a record with a hole": ([table(4), 3.0, "text", table(4)], 4),
    "a parameter": (nn.Parameter(table(5)), 5),
    "prototypes of several lengths": ([torch.ones(n, 4) for n in (8, 3, 2, 1, 5)], 8),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_values_are_refused(kind):
    x, b = AMBIGUOUS[kind]
    samples = Samples()
    with pytest.raises(ESAMTypeError, match=rf"`batch\[0\]` is ambiguous.*{WAYS_OUT}"):
        samples.check(((x, table(b)), {}), b)
    with pytest.raises(ESAMTypeError, match=rf"`deep\['x'\]`.*{b} losses"):
        samples.check(((table(b),), {"deep": {"x": x}}), b)
    samples.check(((Whole(x), table(b)), {}), b)
    (part, _), _ = samples.take(((Whole(x), table(b)), {}), torch.tensor([0]), b)
    same(part, x)


def test_refused_batches_are_not_remembered():
    samples = Samples()
    with pytest.raises(ESAMTypeError):
        samples.check(((torch.ones(2, 2), planes(3)), {}), 3)
    samples.check(first(table(2)), 2)  # the first argument had two rows then, but not as samples
    assert len(samples.take(first(table(2)), torch.tensor([0]), 2)[0][0]) == 1


def test_resolving_ambiguous_values():
    images = planes(3)
    same(taken(Rows(images), 3, torch.tensor([0, 2])), [images[0], images[2]])
    same(taken([Rows(table(2, 4)), Rows(table(2, 4))], 2, torch.tensor([1])), [table(2, 4)[1:]] * 2)
    same(taken(Rows((224, 225)), 2, torch.tensor([1])), (225,))


def test_different_tensors_with_b_rows_are_a_container():
    """Images and labels in a list of two, for two samples."""
    x, y = table(2, 3), torch.tensor([0, 1])
    same(taken([x, y], 2, torch.tensor([1])), [x[1:], y[1:]])
    same(taken((x, y, None), 2, torch.tensor([1])), (x[1:], y[1:], None))


def test_earlier_batches_decide():
    """In the smaller last batch, lists have as many items as there are samples."""
    samples, one = Samples(), torch.tensor([1])
    full = {"pair": [table(8), table(8)], "sizes": (224, 224), "weights": torch.ones(2)}
    full |= {"images": planes(8, 2), "prior": [torch.ones(3), torch.ones(5)]}
    assert len(taken(full, 8, samples=samples)["images"]) == 2
    last = {"pair": [table(2), table(2)], "sizes": (224, 224), "weights": torch.ones(2)}
    last |= {"images": planes(2, 2), "prior": [torch.ones(2), torch.ones(5)]}
    wanted = {"pair": [table(2)[1:], table(2)[1:]], "sizes": (224, 224), "weights": torch.ones(2)}
    wanted |= {"images": planes(2, 2)[1:], "prior": last["prior"]}
    same(taken(last, 2, one, samples), wanted)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (table(6), torch.ones(10)),  # class weights, with as many classes as samples
        (list("abcdef"), list("abcdefgh")),
        (np.arange(6), np.arange(8)),
    ],
)
def test_values_with_entries_per_sample_must_keep_them(before, now):
    samples = Samples()
    samples.check(((before, table(6)), {}), 6)
    with pytest.raises(ESAMValueError, match=rf"`batch\[0\]` had one entry per.*{WAYS_OUT}.*4 los"):
        samples.check(((now, table(4)), {}), 4)


def test_rows_with_the_wrong_length():
    samples = Samples()
    for x, b in (([1, 2], 3), (table(2), 3), ("abc", 3), (4, 3), ({1, 2, 3}, 3)):
        with pytest.raises(ESAMValueError, match=rf"`batch\[0\]` must have one entry.*{b} losses"):
            samples.check(((Rows(x), table(3)), {}), 3)
    with pytest.raises(ESAMValueError, match=r"`batch\[0\]\['n'\]` must have one entry"):
        samples.check(((Rows({"x": table(3), "n": 3}), table(3)), {}), 3)


# -- values that cannot be split ------------------------------------------------------------------


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Deep:
    def __init__(self, x):
        self.inner = Holder({"x": [x]})


REFUSED = {
    "an object of one's own": (lambda: Holder(table(5)), r"contain samples, in `x`"),
    "an object with slots": (lambda: Slotted(np.arange(5)), r"contain samples, in `x`"),
    "an object in an object": (lambda: Deep(table(5)), r"contain samples, in `inner.x`"),
    "an iterator": (lambda: iter([1, 2]), r"read only once"),
    "a generator": (lambda: (x for x in "abcde"), r"read only once"),
    "a packed sequence": (packed, r"PackedSequence.*padded"),
    "a nested tensor": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        r"NestedTensor.*padded",
    ),
    "a queue": (lambda: deque("abcde"), r"deque.*cannot be indexed"),
    "a range": (lambda: range(5), r"range.*cannot be indexed"),
    "compressed rows": (lambda: torch.eye(5).to_sparse_bsr((1, 1)), r"can be indexed by sample"),
}


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize("kind", REFUSED)
def test_values_that_cannot_be_split_are_refused(kind):
    make, match = REFUSED[kind]
    with pytest.raises(ESAMTypeError, match=rf"`batch\[0\]\['x'\]`.*{match}"):
        Samples().check((({"x": make()}, table(5)), {}), 5)
    whole = make()
    samples, batch = Samples(), ((Whole(whole), table(5)), {})
    samples.check(batch, 5)
    assert samples.take(batch, CHOSEN, 5)[0][0] is whole


def test_a_container_that_cannot_be_rebuilt_is_refused_and_not_changed():
    x = table(5)
    data = SharedStore({"x": x})
    with pytest.raises(ESAMTypeError, match=r"is a SharedStore, which cannot be rebuilt"):
        Samples().check(first(data), 5)
    assert data["x"] is x


@pytest.mark.parametrize("length", [4, 15])
def test_a_batch_without_samples(length):
    with pytest.raises(ESAMValueError, match=rf"loss per.*{WAYS_OUT}.*15 losses.*shape \(5, 3\)"):
        Samples().check(((torch.ones(5, 3), "text"), {"n": 3}), 15)
    with pytest.raises(ESAMValueError, match=r"`losses.reshape\(5, 3\).mean\(1\)`"):
        Samples().check(first(torch.ones(5, 3)), 15)
    with pytest.raises(ESAMValueError, match=rf"Received: {length} losses, and.*nothing"):
        Samples().check(((), {}), length)
