"""Attention that computes the same in passes without all gradients as in the others.

In evaluation mode, `nn.TransformerEncoder` and `nn.MultiheadAttention` use a faster path if no
weight needs a gradient. At padded positions, it gives other outputs.
"""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["without_fast_path", "without_graphs"]


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Do not use the faster path inside the context."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Compute no gradients, and the same values, inside the context."""
    with torch.no_grad(), without_fast_path():
        yield
