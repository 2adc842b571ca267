"""Text as data: passages and their next bytes, separate from the test text."""

import pytest
import torch
from benchmarks.data import load_source
from benchmarks.data.text import TESTED, reference_text
from benchmarks.losses import sample_losses


def test_paragraphs_are_unique_and_the_test_text_is_not_trained_on() -> None:
    text = reference_text()
    paragraphs = text.split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert "Assert statements are a convenient way" in text  # English, about Python
    source = load_source("pydoc", batch=16, seed=0, images=100_000, size=32)
    tested = torch.cat([x for x, _ in source.test()]).flatten()
    trained = torch.cat([x for x, _ in source.training()]).flatten()
    content = text.encode()
    assert bytes(trained.tolist()) == content[: len(trained)]
    assert bytes(tested.tolist()) == content[-TESTED:][: len(tested)]
    assert len(content) >= 100_000 + TESTED


def test_passages_have_their_next_bytes_and_differ_between_epochs() -> None:
    source = load_source("pydoc", batch=16, seed=3, images=10_000, size=32)
    epochs = [list(source.epoch(e)) for e in (0, 1, 0)]
    assert len(epochs[0]) == source.steps
    x, y = epochs[0][0]
    assert x.shape == y.shape == (16, 32)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert bytes(x[0].tolist() + y[0, -1:].tolist()) in reference_text().encode()
    assert torch.equal(epochs[2][0][0], x)
    assert not torch.equal(epochs[1][0][0], x)
    with pytest.raises(ValueError, match="`images` must be at most"):
        load_source("pydoc", batch=16, seed=0, images=10**7)


def test_the_loss_of_a_passage_is_the_mean_over_its_positions() -> None:
    logits, targets = torch.randn(3, 5, 4), torch.randint(5, (3, 4))
    expected = [
        torch.nn.functional.cross_entropy(logits[i].T, targets[i], label_smoothing=0.1)
        for i in range(3)
    ]
    torch.testing.assert_close(sample_losses(logits, targets, smoothing=0.1), torch.stack(expected))
