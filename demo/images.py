"""The demo's data."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from benchmarks.data.arrays import ImageSet
from benchmarks.data.batches import Batches
from benchmarks.data.files import READERS, digits
from torch import Tensor

__all__ = ["Epochs", "load"]

_LAYOUT = """\
--data must be a folder with the official python layout of CIFAR, one of
    FOLDER/cifar-10-batches-py/data_batch_1 ... data_batch_5, test_batch
    FOLDER/cifar-100-python/train, test"""


def load(folder: Path | None) -> ImageSet:
    """Return CIFAR-10 or CIFAR-100 from a folder, or scikit-learn's digits.

    Raises:
        SystemExit: the folder does not have the required contents; the message describes them.
    """
    if folder is None:
        return digits()
    for name in ("cifar10", "cifar100"):
        reader, (first, *_) = READERS[name]
        if (folder / first).exists():
            try:
                return reader(folder)
            except Exception as error:  # unpickling may raise anything
                raise SystemExit(
                    f"{_LAYOUT}\nReceived: {folder / Path(first).parent}, which could not be read: "
                    f"{type(error).__name__}: {error}"
                ) from None
    if not folder.is_dir():
        raise SystemExit(f"{_LAYOUT}\nReceived: {folder}, which is not a folder.")
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise SystemExit(f"{_LAYOUT}\nReceived: {folder}, which contains {inside}.")


class Epochs:
    """A loader whose n-th pass over the data is the same for every method."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._epoch = 0

    def __len__(self) -> int:
        return self._batches.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._epoch += 1
        return self._batches.epoch(self._epoch)


class Tests:
    """A loader of the test images."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return int(np.ceil(len(self._batches.data.test) / 500))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches.test(500)
