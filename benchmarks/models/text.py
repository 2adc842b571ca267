"""A small causal transformer that predicts the next symbol at every position of a text."""

import torch
from torch import Tensor, nn

from benchmarks.models.vit import Layer

__all__ = ["TextTransformer"]


class TextTransformer(nn.Module):
    """Embedded symbols, learned positions, `depth` causal layers, a norm and a linear head.

    Args:
        symbols: number of symbols.
        length: length of a passage.
        width: width of the embedding, a multiple of `heads`.
        depth: number of layers, layers.0 to layers.{depth - 1}.
        heads: number of attention heads.
    """

    def __init__(self, *, symbols: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.positions = nn.Parameter(torch.empty(1, length, width))
        self.layers = nn.Sequential(*(Layer(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, symbols)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next symbol at each position: (b, symbols, length)."""
        x = self.embedding(x) + self.positions
        return self.head(self.norm(self.layers(x))).transpose(1, 2)
