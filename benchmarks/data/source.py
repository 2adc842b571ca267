"""Find the data set that a command names."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.data.arrays import ImageSet, balanced_subset, noisy_labels, shrunk
from benchmarks.data.batches import Batches
from benchmarks.data.files import READERS, detect, digits, synthetic
from benchmarks.data.folders import ImageFolder
from benchmarks.data.text import Passages, reference_text

__all__ = ["Source", "check_images", "load_images", "load_source"]


class Source(Protocol):
    """The interface of data in the training loop."""

    name: str
    note: str
    batch: int

    @property
    def classes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def training_images(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def test(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def _image_folder(name: str) -> Path | None:
    """Return the folder in ImageNet's layout that a name means, or None."""
    folder = Path(name.removeprefix("imagenet:"))
    return folder if (folder / "train").is_dir() and (folder / "val").is_dir() else None


def check_images(name: str) -> None:
    """Raise a ValueError unless the name is that of images on this machine."""
    if _image_folder(name) is None:
        load_images(name)


def load_images(name: str) -> ImageSet:
    """Return the set of images with this name.

    Args:
        name: "digits", "synthetic", a folder, "cifar10:FOLDER" and the like if a folder contains
            several sets, or "cifar10" and the like for a set in $ESAM_DATA, or else in ./data.
    """
    if name == "digits":
        return digits()
    if name == "synthetic":
        return synthetic()
    if name in READERS:
        name = f"{name}:{os.environ.get('ESAM_DATA', 'data')}"
    wanted, _, path = name.rpartition(":")
    found = detect(Path(path), wanted or None) if wanted in ("", *READERS) else None
    if found is None:
        expected = "\n".join(
            f"  {known}: {' or '.join(files)}" for known, (_, files) in READERS.items()
        )
        raise ValueError(
            f"`data` must be digits, synthetic, or a folder that contains one of\n{expected}\n"
            f"  imagenet: train/ and val/ with one folder a class\nReceived: {name!r}."
        )
    return found


def _refuse_options(what: str, *options: tuple[str, object]) -> None:
    """Raise if options are given that data of this kind do not have."""
    given = [f"`{name}`" for name, value in options if value]
    if given:
        raise ValueError(f"{what} has no option {', '.join(given)}.")


def load_source(
    name: str,
    *,
    batch: int,
    seed: int,
    device: torch.device | str = "cpu",
    images: int | None = None,
    classes: int | None = None,
    first_class: int = 0,
    spare: bool = False,
    size: int | None = None,
    noise: float = 0.0,
    augment: bool = True,
    channels_last: bool = False,
) -> Source:
    """Return batches of the named data.

    Args:
        name: as in `load_images`, a folder in ImageNet's layout, or "pydoc", a text, for which
            `images` is the number of bytes and `size` the length of a passage.
        batch: samples per step.
        seed: the seed of order and augmentation; it does not affect which images are in a subset.
        device: the device of the batches.
        images: number of training images; None is all.
        classes: number of classes; None is all.
        first_class: the first of these classes.
        spare: also test on the unused training images.
        size: height and width to downscale the images to; None keeps them.
        noise: share of wrong training labels.
        augment: crop and mirror.
        channels_last: memory format of the images.
    """
    if name == "pydoc":
        _refuse_options(
            "A text",
            *(("classes", classes), ("first_class", first_class), ("spare", spare)),
            *(("noise", noise), ("augment", not augment)),
        )
        length = {} if size is None else {"length": size}
        bytes_of_text = images or 131072
        text = reference_text()
        return Passages(text, batch=batch, seed=seed, size=bytes_of_text, device=device, **length)
    folder = _image_folder(name)
    if folder is not None:
        _refuse_options(
            "A folder in ImageNet's layout",
            *(("images", images), ("classes", classes), ("first_class", first_class)),
            *(("spare", spare), ("noise", noise), ("augment", not augment)),
        )
        return ImageFolder(
            folder,
            batch=batch,
            seed=seed,
            device=device,
            size=size or 224,
            channels_last=channels_last,
        )
    if spare and images is None:
        raise ValueError("`spare` needs `images`: without it, no training images are unused.")
    data = balanced_subset(
        load_images(name), images=images, classes=classes, first_class=first_class, spare=spare
    )
    data = shrunk(noisy_labels(data, noise), size)
    return Batches(
        data,
        batch=batch,
        seed=seed,
        device=device,
        augment=augment,
        channels_last=channels_last,
    )
