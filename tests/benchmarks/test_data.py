"""Data: files are read as published, batches depend only on (seed, epoch), subsets are balanced."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.data import Batches, balanced_subset, folders, load_source, noisy_labels, shrunk
from benchmarks.data.arrays import ImageSet, Split
from benchmarks.data.batches import crop_and_flip
from benchmarks.data.files import digits, synthetic
from benchmarks.data.folders import ImageFolder, write_small_folder
from benchmarks.data.source import load_images
from PIL import Image


def _write_cifar100(folder: Path) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
    inner = folder / "cifar-100-python"
    inner.mkdir()
    for part in ("train", "test"):
        content = {b"data": images, b"fine_labels": list(range(40))}
        (inner / part).write_bytes(pickle.dumps(content))
    return images


def test_cifar_rows_are_channels_rows_columns(tmp_path: Path) -> None:
    images = _write_cifar100(tmp_path)
    data = load_images(str(tmp_path))
    assert data.name == "cifar100"
    assert data.classes == 100
    # Byte 1024 c + 32 y + x of a row is channel c of the pixel in row y and column x.
    assert data.train.images[7, 2, 3, 5] == images[7, 2 * 1024 + 3 * 32 + 5]
    assert data.test.labels.tolist() == list(range(40))


def test_fashion_files_are_read_gzipped_or_not(tmp_path: Path) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    head = bytes([0, 0, 8, 3]) + np.array([2, 28, 28], ">i4").tobytes()
    labels = bytes([0, 0, 8, 1]) + np.array([2], ">i4").tobytes() + bytes([4, 9])
    for prefix in ("train", "t10k"):
        packed = gzip.compress(head + pixels.tobytes())
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(packed)
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    data = load_images(str(tmp_path))
    assert (data.name, data.shape) == ("fashion", (1, 28, 28))
    assert np.array_equal(data.test.images[:, 0], pixels)
    assert data.train.labels.tolist() == [4, 9]


def test_an_error_for_a_wrong_folder_lists_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)must be digits.*cifar-100-python/train.*Received"):
        load_source(str(tmp_path), batch=4, seed=0)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    first, again, other = (Batches(digits(), batch=64, seed=s) for s in (0, 0, 1))

    def labels(batches: Batches, epoch: int) -> list[int]:
        return torch.cat([y for _, y in batches.epoch(epoch)]).tolist()

    for (x, _), (y, _) in zip(first.epoch(3), again.epoch(3), strict=True):
        assert torch.equal(x, y)
    assert labels(first, 3) != labels(first, 4)
    assert labels(first, 3) != labels(other, 3)
    assert first.steps == 1297 // 64


def test_crop_and_flip_against_slices() -> None:
    x = torch.arange(2 * 1 * 3 * 3.0).view(2, 1, 3, 3)
    out = crop_and_flip(
        x, torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([False, True]), pad=1
    )
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    assert torch.equal(out[0], padded[0, :, 0:3, 2:5])
    assert torch.equal(out[1], x[1].flip(-1))


def test_subset_is_balanced_and_labels_stay_in_range() -> None:
    data = balanced_subset(digits(), images=52, classes=5)
    counts = np.bincount(data.train.labels, minlength=5)
    assert sorted(counts.tolist()) == [10, 10, 10, 11, 11]
    assert data.test.labels.max() == 4
    assert "52 of 1297" in data.note


def test_other_classes_get_labels_from_0() -> None:
    whole, data = digits(), balanced_subset(digits(), classes=4, first_class=6)
    assert data.classes == 4
    for all_images, some in ((whole.train, data.train), (whole.test, data.test)):
        found = np.flatnonzero(all_images.labels >= 6)
        assert np.array_equal(some.labels, all_images.labels[found] - 6)
        assert np.array_equal(some.images, all_images.images[found])
    assert "4 of 10 classes from class 6" in data.note


def test_a_first_class_that_leaves_too_few_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`first_class` must be in \[0, 6\].*Received: 7"):
        balanced_subset(digits(), classes=4, first_class=7)


def test_spare_images_are_only_for_testing() -> None:
    data = balanced_subset(digits(), images=100, spare=True)
    assert len(data.train) + len(data.test) == 1797
    images = {image.tobytes() for image in data.train.images}
    assert not any(image.tobytes() in images for image in data.test.images)
    assert "tested on 1697 others" in data.note


def test_noise_changes_the_given_share_of_training_labels_only() -> None:
    clean = digits()
    noisy = noisy_labels(clean, 0.3)
    wrong = (clean.train.labels != noisy.train.labels).mean()
    assert wrong == pytest.approx(0.3, abs=1e-3)
    assert np.array_equal(clean.test.labels, noisy.test.labels)


def test_shrinking_averages() -> None:
    data = synthetic(train=4, test=2)
    small = shrunk(data, 16)
    corner = data.train.images[1, 2, 4:6, 10:12].mean()
    assert small.train.images[1, 2, 2, 5] == np.rint(corner)
    assert small.padding == 2


def test_image_folder(tmp_path: Path) -> None:
    write_small_folder(tmp_path, classes=3, train=4, test=2)
    folder = load_source(str(tmp_path), batch=5, seed=0, size=32)
    assert isinstance(folder, ImageFolder)
    assert (folder.classes, folder.steps, folder.shape) == (3, 2, (3, 32, 32))
    once, again = list(folder.epoch(0)), list(folder.epoch(0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))
    assert sum(len(y) for _, y in folder.test()) == 6


#: Draws of a crop: area, ratio, left, top, mirror.
WHOLE, QUARTER = 1.0, (0.25 - 0.08) / 0.92


@pytest.mark.parametrize(
    ("draws", "corners"),
    [
        ((WHOLE, 0.5, 0.5, 0.5, 0.9), "abcd"),
        ((WHOLE, 0.5, 0.5, 0.5, 0.1), "badc"),
        ((QUARTER, 0.5, 0.0, 0.0, 0.9), "aaaa"),
        ((QUARTER, 0.5, 0.999, 0.0, 0.9), "bbbb"),
        ((QUARTER, 0.5, 0.0, 0.999, 0.1), "cccc"),
        ((QUARTER, 0.5, 0.5, 0.999, 0.9), "cdcd"),
        ((QUARTER, 0.5, 0.5, 0.999, 0.1), "dcdc"),
    ],
)
def test_a_training_image_is_cropped_and_mirrored_as_drawn(
    draws: tuple[float, ...], corners: str, tmp_path: Path
) -> None:
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (255, 255, 255)}
    pixels = np.zeros((40, 40, 3), np.uint8)  # a is left of b; below them, c is left of d
    for name, (row, column) in zip("abcd", ((0, 0), (0, 20), (20, 0), (20, 20)), strict=True):
        pixels[row : row + 20, column : column + 20] = colours[name]
    write_small_folder(tmp_path, classes=1, train=1, test=1)
    path = tmp_path / "quarters.png"
    Image.fromarray(pixels).save(path)
    folder = ImageFolder(tmp_path, batch=1, seed=0, size=16)
    image = folder._crop(path, np.array(draws)) * folders._STD + folders._MEAN
    found = [image[:, row, column] for row in (1, -2) for column in (1, -2)]
    for seen, name in zip(found, corners, strict=True):
        expected = torch.tensor(colours[name]) / 255
        torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)


def test_crops_of_a_folder_differ_between_epochs(tmp_path: Path) -> None:
    write_small_folder(tmp_path, classes=1, train=1, test=1)
    folder = ImageFolder(tmp_path, batch=1, seed=0, size=16)
    images = [next(folder.epoch(epoch))[0] for epoch in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    mirrored = []

    def cropped(_: Path, draws: np.ndarray) -> torch.Tensor:
        mirrored.append(draws[4] < 0.5)
        return torch.zeros(3, 16, 16)

    folder._crop = cropped
    for epoch in range(200):
        list(folder.epoch(epoch))
    assert 70 < sum(mirrored) < 130


def test_moments_are_those_of_the_pixels() -> None:
    """Bit for bit, after rounding to float32: they are computed from counts."""
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    images[:, 1] //= 7
    split = Split(images, np.arange(50) % 3)
    data = ImageSet("noise", 3, split, split, padding=1, flip=True)
    pixels = images.astype(np.float64) / 255
    batches = Batches(data, batch=10, seed=0)
    for found, wanted in ((batches._mean, pixels.mean), (batches._std, pixels.std)):
        assert found.flatten().tolist() == wanted((0, 2, 3)).astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pydoc", {"noise": 0.1, "classes": 3}, "A text has no option `classes`, `noise`"),
        ("folder", {"images": 3, "augment": False}, "layout has no option `images`, `augment`"),
        ("digits", {"spare": True}, "`spare` needs `images`"),
    ],
)
def test_options_without_effect_are_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if name == "folder":
        name = str(write_small_folder(tmp_path, train=2, test=2))
    with pytest.raises(ValueError, match=message):
        load_source(name, batch=2, seed=0, **options)
