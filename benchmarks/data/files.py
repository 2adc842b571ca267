"""Data sets from their published files."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.arrays import ImageSet, Split

__all__ = ["READERS", "detect", "digits", "synthetic"]


def _unpickle(path: Path) -> dict[bytes, Any]:
    """Return a pickled dictionary; the official archives were written by Python 2."""
    with path.open("rb") as file:
        return pickle.load(file, encoding="bytes")


def _cifar_split(paths: list[Path], key: bytes) -> Split:
    parts = [_unpickle(path) for path in paths]
    images = np.concatenate([np.asarray(p[b"data"], dtype=np.uint8) for p in parts])
    labels = np.concatenate([np.asarray(p[key], dtype=np.int64) for p in parts])
    return Split(images.reshape(-1, 3, 32, 32), labels)


def cifar10(folder: Path) -> ImageSet:
    """Return CIFAR-10 from a folder that contains cifar-10-batches-py."""
    inner = folder / "cifar-10-batches-py"
    train = _cifar_split([inner / f"data_batch_{i}" for i in range(1, 6)], b"labels")
    return ImageSet("cifar10", 10, train, _cifar_split([inner / "test_batch"], b"labels"))


def cifar100(folder: Path) -> ImageSet:
    """Return CIFAR-100 with fine labels from a folder that contains cifar-100-python."""
    inner = folder / "cifar-100-python"
    train = _cifar_split([inner / "train"], b"fine_labels")
    return ImageSet("cifar100", 100, train, _cifar_split([inner / "test"], b"fine_labels"))


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Return an array from an IDX file of bytes, gzipped or not."""
    plain, packed = folder / name, folder / f"{name}.gz"
    data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{folder / name} must be an IDX file of bytes. Received: another file.")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def fashion(folder: Path) -> ImageSet:
    """Return Fashion-MNIST (or MNIST) from its four IDX files."""

    def split(prefix: str) -> Split:
        images = _idx(folder, f"{prefix}-images-idx3-ubyte")[:, None]
        return Split(images, _idx(folder, f"{prefix}-labels-idx1-ubyte").astype(np.int64))

    return ImageSet("fashion", 10, split("train"), split("t10k"), padding=2)


def digits() -> ImageSet:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8; the last 500 are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, test = Split(images[:-500], labels[:-500]), Split(images[-500:], labels[-500:])
    return ImageSet("digits", 10, train, test, padding=1, flip=False)


def synthetic(classes: int = 10, train: int = 512, test: int = 256, size: int = 32) -> ImageSet:
    """Return noisy images of one smooth pattern per class, for tests only."""
    generator = np.random.Generator(np.random.Philox(key=[0, 3]))
    patterns = generator.uniform(0, 255, (classes, 3, 4, 4)).repeat(size // 4, 2)
    patterns = patterns.repeat(size // 4, 3)

    def split(n: int) -> Split:
        labels = generator.integers(0, classes, n)
        noisy = patterns[labels] + generator.normal(0, 64, (n, 3, size, size))
        return Split(np.clip(noisy, 0, 255).astype(np.uint8), labels.astype(np.int64))

    return ImageSet("synthetic", classes, split(train), split(test))


#: Readers of folders, with the file by which each recognises its data set.
READERS = {
    "cifar100": (cifar100, ("cifar-100-python/train",)),
    "cifar10": (cifar10, ("cifar-10-batches-py/data_batch_1",)),
    "fashion": (fashion, ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")),
}


def detect(folder: Path, wanted: str | None = None) -> ImageSet | None:
    """Return the data set in a folder (`wanted` if there are several), or None."""
    for name, (reader, files) in READERS.items():
        if wanted in (None, name) and any((folder / file).exists() for file in files):
            return reader(folder)
    return None
