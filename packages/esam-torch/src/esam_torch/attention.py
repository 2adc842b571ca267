"""Attention that computes the same in passes without all gradients as in the others.

In evaluation mode, `nn.TransformerEncoder` and `nn.MultiheadAttention` use a faster path if no
weight needs a gradient. At padded positions, it gives other outputs.
"""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["without_graphs"]


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Compute no gradients, and the same values, inside the context."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
