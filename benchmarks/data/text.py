"""A text for next-byte prediction: the language reference that CPython ships as `pydoc_data`."""

import hashlib
import importlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Passages", "reference_text"]

#: Bytes of the test text: the end of the text.
TESTED = 65536


def reference_text() -> str:
    """Return Python's language reference in English, each paragraph once.

    This is the text of `help("topics")`. Topics share paragraphs; without the repetitions, no test
    passage occurs in the training text.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


class Passages:
    """Training and test batches of passages of a text, with the next byte at each position.

    Each epoch cuts the training text into passages, starting at an offset that depends only on
    (seed, epoch), as does the order of the passages.

    Args:
        text: its beginning is the training text, and its last `TESTED` bytes are the test text.
        batch: passages per step. A smaller last batch is dropped.
        seed: the seed of offset and order.
        size: bytes of the training text, from the beginning of the text.
        length: length of a passage, in bytes.
        device: the device of text and batches.
    """

    classes = 256

    def __init__(
        self,
        text: str,
        *,
        batch: int,
        seed: int,
        size: int,
        length: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        content = np.frombuffer(text.encode(), np.uint8)
        if size + TESTED > len(content):
            largest = len(content) - TESTED
            raise ValueError(f"`images` must be at most {largest} bytes. Received: {size}.")
        self.name = "pydoc"
        self.batch, self.seed, self.length = batch, seed, length
        self.device = torch.device(device)
        if (size - 1) // length - 1 < batch:
            raise ValueError(
                f"`images` must be the bytes of at least {batch} passages of {length} bytes. "
                f"Received: {size}."
            )
        self._train = content[:size].astype(np.int64)
        self._test = content[-TESTED:].astype(np.int64)
        digest = hashlib.sha256(content.tobytes()).hexdigest()[:12]
        self.note = f"{size} bytes, tested on {TESTED} others, of a text with SHA-256 {digest}..."

    @property
    def shape(self) -> tuple[int, int, int]:
        """One channel, and the length of a passage as its height."""
        return 1, self.length, 1

    @property
    def training_images(self) -> int:
        """Passages per epoch."""
        return (len(self._train) - 1) // self.length - 1

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self.training_images // self.batch

    def _pairs(self, starts: NDArray[np.int64], content: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Return the passages at given positions, and the next byte after each of their bytes."""
        rows = starts[:, None] + np.arange(self.length + 1)
        passages = torch.from_numpy(content[rows]).to(self.device)
        return passages[:, :-1].contiguous(), passages[:, 1:].contiguous()

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training batches of an epoch."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 8) + 7]))
        offset = int(generator.integers(0, self.length))
        order = generator.permutation(self.training_images)
        for i in range(self.steps):
            chosen = order[i * self.batch : (i + 1) * self.batch]
            x, y = self._pairs(offset + chosen * self.length, self._train)
            yield x, y

    def test(self, batch: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all passages of the test text in order."""
        return self._in_order(self._test, batch)

    def training(self, batch: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all passages of the training text in order, cut from its first byte."""
        return self._in_order(self._train, batch)

    def _in_order(self, content: NDArray[np.int64], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        starts = np.arange(0, len(content) - self.length, self.length)
        for i in range(0, len(starts), batch):
            x, y = self._pairs(starts[i : i + batch], content)
            yield x, y
