"""Batches on the device, where the whole set is stored, cropped and mirrored."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.data.arrays import ImageSet, Split

__all__ = ["Batches", "crop_and_flip"]


def crop_and_flip(images: Tensor, down: Tensor, right: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Return the images, each shifted by its own offset in a border of zeros and maybe mirrored.

    Args:
        images: (b, c, h, w).
        down: (b,) integers in [0, 2 pad]; `pad` is no shift.
        right: (b,) integers in [0, 2 pad].
        flip: (b,) booleans, whether to mirror.
        pad: width of the border.
    """
    b, c, h, w = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    rows = down[:, None] + torch.arange(h, device=device)
    columns = torch.arange(w, device=device).expand(b, w)
    columns = right[:, None] + torch.where(flip[:, None], w - 1 - columns, columns)
    return padded[
        torch.arange(b, device=device)[:, None, None, None],
        torch.arange(c, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _moments(images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Return the (c, 1, 1) means and standard deviations of the channels, of pixels in [0, 1].

    They are computed from the number of pixels of each value, which needs no copy of the images.
    """
    values = np.arange(256) / 255
    found = []
    for channel in range(images.shape[1]):
        shares = np.bincount(images[:, channel].reshape(-1), minlength=256) / images[:, 0].size
        mean = float(shares @ values)
        found.append((mean, float(shares @ (values - mean) ** 2) ** 0.5))
    means, deviations = torch.tensor(found, dtype=torch.float32).T
    return means[:, None, None], deviations[:, None, None]


class Batches:
    """Training and test batches of an `ImageSet`.

    Order, offsets and mirroring of an epoch depend only on (seed, epoch) and are drawn on the host.
    A resumed run therefore gets the same batches as an uninterrupted one, on every device.

    Args:
        data: the images.
        batch: samples per step. A smaller last batch is dropped unless it is the only one.
        seed: the seed of order and augmentation.
        device: the device of images and batches.
        augment: crop and mirror the training images.
        channels_last: memory format of the images.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        augment: bool = True,
        channels_last: bool = False,
    ) -> None:
        self.data = data
        self.batch = min(batch, len(data.train))
        self.seed = seed
        self.device = torch.device(device)
        self.augment = augment
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean, self._std = _moments(data.train.images)
        self._train = self._on_device(data.train)
        self._test = self._on_device(data.test)

    def _on_device(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return normalised images and labels, on the device."""
        images = torch.from_numpy(split.images).to(self.device).float().div_(255)
        images.sub_(self._mean.to(self.device)).div_(self._std.to(self.device))
        return images, torch.from_numpy(split.labels).to(self.device)

    @property
    def classes(self) -> int:
        return self.data.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.data.shape

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def note(self) -> str:
        return self.data.note

    @property
    def training_images(self) -> int:
        return len(self.data.train)

    @property
    def steps(self) -> int:
        """The number of batches per epoch."""
        return len(self.data.train) // self.batch

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 8) + 4]))

    def order(self, epoch: int) -> Tensor:
        """Return the indices of the training images in the order of an epoch."""
        return torch.from_numpy(self._generator(epoch).permutation(len(self.data.train)))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training batches of an epoch."""
        images, labels = self._train
        n, pad = len(labels), self.data.padding
        generator = self._generator(epoch)
        order = torch.from_numpy(generator.permutation(n)).to(self.device)
        offsets = torch.from_numpy(generator.integers(0, 2 * pad + 1, (2, n))).to(self.device)
        flips = torch.from_numpy(generator.random(n) < 0.5).to(self.device) & self.data.flip
        for i in range(self.steps):
            part = slice(i * self.batch, (i + 1) * self.batch)
            chosen = order[part]
            x = images[chosen]
            if self.augment:
                x = crop_and_flip(x, offsets[0, part], offsets[1, part], flips[part], pad)
            yield x.contiguous(memory_format=self.format), labels[chosen]

    def test(self, batch: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images in order."""
        return self._in_order(self._test, batch)

    def training(self, batch: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all training images in order, without augmentation."""
        return self._in_order(self._train, batch)

    def _in_order(
        self, split: tuple[Tensor, Tensor], batch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = split
        for start in range(0, len(labels), batch):
            x = images[start : start + batch]
            yield x.contiguous(memory_format=self.format), labels[start : start + batch]
