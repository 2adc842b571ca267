"""Sets of small images in memory, and subsets of them."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["ImageSet", "Split", "balanced_subset", "noisy_labels", "shrunk"]


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Args:
        images: (n, channels, height, width), uint8.
        labels: (n,), int64, in [0, classes).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "Split":
        """Return the images with these indices, in this order."""
        return Split(self.images[indices], self.labels[indices])

    def of_classes(self, first: int, count: int) -> "Split":
        """Return the images of some classes, with labels that start at 0."""
        found = self.take(np.flatnonzero((first <= self.labels) & (self.labels < first + count)))
        return Split(found.images, found.labels - first)


@dataclass(frozen=True)
class ImageSet:
    """Training and test images.

    Args:
        name: such as "cifar100".
        classes: number of classes.
        train: the training images.
        test: the test images.
        padding: pixels by which a random crop may move to each side.
        flip: whether a mirrored image has the same class.
        note: how the set was reduced, for reports.
    """

    name: str
    classes: int
    train: Split
    test: Split
    padding: int = 4
    flip: bool = True
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def balanced_subset(
    data: ImageSet,
    *,
    images: int | None = None,
    classes: int | None = None,
    first_class: int = 0,
    spare: bool = False,
    seed: int = 0,
) -> ImageSet:
    """Return a subset with fewer training images, balanced by class, and fewer classes.

    Args:
        data: the whole set.
        images: number of training images, >= classes; None keeps all. The first `images % classes`
            classes get one more.
        classes: number of classes kept, in training and test; None keeps all.
        first_class: the first class kept; it becomes class 0.
        spare: also test on the unused training images, for a more precise test.
        seed: the seed of the choice of images.
    """
    kept = data.classes if classes is None else classes
    if not 2 <= kept <= data.classes:
        raise ValueError(f"`classes` must be in [2, {data.classes}]. Received: {classes}.")
    if not 0 <= first_class <= data.classes - kept:
        raise ValueError(
            f"`first_class` must be in [0, {data.classes - kept}], so that there are {kept} "
            f"classes. Received: {first_class}."
        )
    train = data.train.of_classes(first_class, kept)
    test = data.test.of_classes(first_class, kept)
    if images is not None:
        if not kept <= images <= len(train):
            raise ValueError(f"`images` must be in [{kept}, {len(train)}]. Received: {images}.")
        generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
        order = generator.permutation(len(train))
        chosen = []
        for label in range(kept):
            count = images // kept + (label < images % kept)
            members = order[train.labels[order] == label]
            if len(members) < count:
                raise ValueError(
                    f"`images` must not exceed any class's images: class {label} has "
                    f"{len(members)}. Received: {images}, which needs {count}."
                )
            chosen.append(members[:count])
        taken = np.sort(np.concatenate(chosen))
        if spare:
            rest = train.take(np.setdiff1d(np.arange(len(train)), taken))
            test = Split(
                np.concatenate([test.images, rest.images]),
                np.concatenate([test.labels, rest.labels]),
            )
        train = train.take(taken)
    if len(train) == len(data.train) and kept == data.classes:
        return data
    which = f"{kept} of {data.classes} classes"
    if first_class:
        which += f" from class {first_class}"
    note = f"{which}, {len(train)} of {len(data.train)} training images"
    if spare:
        note += f", tested on {len(test)} others"
    return replace(data, classes=kept, train=train, test=test, note=_join(data.note, note))


def noisy_labels(data: ImageSet, share: float, seed: int = 0) -> ImageSet:
    """Return the set with a share of the training labels replaced by other classes.

    Args:
        data: any set.
        share: the share of labels, in [0, 1).
        seed: the seed of the choice of images and of their new classes.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"`noise` must be in [0, 1). Received: {share}.")
    if share == 0.0:
        return data
    generator = np.random.Generator(np.random.Philox(key=[seed, 2]))
    labels = data.train.labels.copy()
    hit = generator.permutation(len(labels))[: round(share * len(labels))]
    labels[hit] = (labels[hit] + generator.integers(1, data.classes, len(hit))) % data.classes
    note = f"{share:.0%} of the training labels wrong"
    return replace(data, train=Split(data.train.images, labels), note=_join(data.note, note))


def shrunk(data: ImageSet, size: int | None) -> ImageSet:
    """Return the set with images downscaled to size x size by averaging."""
    _, height, width = data.shape
    if size is None or size == height:
        return data
    if height != width or height % size:
        raise ValueError(f"`size` must divide {height}. Received: {size}.")
    factor = height // size

    def smaller(split: Split) -> Split:
        n, channels = split.images.shape[:2]
        tiles = split.images.reshape(n, channels, size, factor, size, factor)
        return Split(np.rint(tiles.mean((3, 5))).astype(np.uint8), split.labels)

    return replace(
        data,
        train=smaller(data.train),
        test=smaller(data.test),
        padding=max(1, data.padding // factor),
        note=_join(data.note, f"averaged down to {size} x {size} pixels"),
    )


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
