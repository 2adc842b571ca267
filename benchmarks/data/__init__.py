"""Image data: CIFAR, Fashion-MNIST, scikit-learn's digits, folders in ImageNet's layout."""

from benchmarks.data.arrays import ImageSet, Split, balanced_subset, noisy_labels, shrunk
from benchmarks.data.batches import Batches
from benchmarks.data.source import Source, load_source

__all__ = [
    "Batches",
    "ImageSet",
    "Source",
    "Split",
    "balanced_subset",
    "load_source",
    "noisy_labels",
    "shrunk",
]
