"""Images in folders, in ImageNet's layout: train/CLASS/*.JPEG and val/CLASS/*.JPEG."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["ImageFolder", "write_small_folder"]

_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


class ImageFolder:
    """Batches from an ImageNet-like folder, read by threads, with the interface of `Batches`.

    Training images are random crops with 8% to 100% of the area and a ratio of 3:4 to 4:3, and
    mirrored at random. Test images are the centre of the image, resized to 8/7 of the size.

    Args:
        folder: contains train/ and val/, each with one folder per class.
        batch: samples per step.
        seed: the seed of order and augmentation.
        device: the device of the batches.
        size: height and width of the network's input.
        threads: number of threads that decode images.
        channels_last: memory format of the batches.
    """

    def __init__(
        self,
        folder: Path,
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        size: int = 224,
        threads: int = 8,
        channels_last: bool = False,
    ) -> None:
        for part in ("train", "val"):
            if not (folder / part).is_dir():
                raise ValueError(f"{folder} must contain a folder {part!r}. Received: none.")
        self._names = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
        self._train = self._list_images(folder / "train")
        self._test = self._list_images(folder / "val")
        self.batch = min(batch, len(self._train))
        self.seed = seed
        self.device = torch.device(device)
        self.size = size
        self.threads = threads
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.name = "imagenet"
        self.note = f"{len(self._names)} classes, {len(self._train)} training images"

    def _list_images(self, folder: Path) -> list[tuple[Path, int]]:
        """Return the image files and their classes."""
        found = [
            (path, label)
            for label, name in enumerate(self._names)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in _SUFFIXES
        ]
        if not found:
            raise ValueError(
                f"{folder} must contain images in one folder per class. Received: none."
            )
        return found

    @property
    def classes(self) -> int:
        return len(self._names)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    @property
    def training_images(self) -> int:
        return len(self._train)

    @property
    def steps(self) -> int:
        """The number of batches per epoch."""
        return len(self._train) // self.batch

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training batches of an epoch."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 8) + 5]))
        order = generator.permutation(len(self._train))
        draws = generator.random((len(self._train), 5))
        with ThreadPoolExecutor(self.threads) as pool:
            for i in range(self.steps):
                chosen = order[i * self.batch : (i + 1) * self.batch]
                x = list(pool.map(lambda j: self._crop(self._train[j][0], draws[j]), chosen))
                yield self._batch_on_device(x, [self._train[j][1] for j in chosen])

    def test(self, batch: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images in order."""
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(self._test), batch):
                part = self._test[start : start + batch]
                x = list(pool.map(lambda item: self._centre(item[0]), part))
                yield self._batch_on_device(x, [label for _, label in part])

    def _batch_on_device(self, images: list[Tensor], labels: list[int]) -> tuple[Tensor, Tensor]:
        x = torch.stack(images).to(self.device).contiguous(memory_format=self.format)
        return x, torch.tensor(labels, device=self.device)

    def _crop(self, path: Path, draws: NDArray[np.float64]) -> Tensor:
        """Return a random crop of an image."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        area = image.width * image.height * (0.08 + 0.92 * draws[0])
        ratio = np.exp(np.log(4 / 3) * (2 * draws[1] - 1))
        width = min(image.width, max(1, round(np.sqrt(area * ratio))))
        height = min(image.height, max(1, round(np.sqrt(area / ratio))))
        left = int(draws[2] * (image.width - width + 1))
        top = int(draws[3] * (image.height - height + 1))
        part = image.resize(
            (self.size, self.size),
            Image.Resampling.BILINEAR,
            box=(left, top, left + width, top + height),
        )
        if draws[4] < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _normalise(part)

    def _centre(self, path: Path) -> Tensor:
        """Return the centre crop of an image."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        side = min(image.size) * 7 / 8
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return _normalise(
            image.resize(
                (self.size, self.size),
                Image.Resampling.BILINEAR,
                box=(left, top, left + side, top + side),
            )
        )


def _normalise(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - _MEAN) / _STD


def write_small_folder(folder: Path, *, classes: int = 4, train: int = 16, test: int = 8) -> Path:
    """Write a folder in ImageNet's layout, of generated images with one colour per class.

    Args:
        folder: the folder; created if it does not exist.
        classes: number of classes.
        train: training images per class.
        test: test images per class.

    Returns:
        The folder.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, 6]))
    for label in range(classes):
        colour = generator.uniform(40, 215, 3)
        for part, count in (("train", train), ("val", test)):
            place = folder / part / f"class{label:03}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                height, width = generator.integers(40, 80, 2)
                pixels = generator.normal(colour, 40, (height, width, 3))
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(place / f"{part}_{i}.JPEG")
    return folder
