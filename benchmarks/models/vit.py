"""Vision transformers (Dosovitskiy et al. 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Layer", "ViT"]


class Attention(nn.Module):
    """Multi-head self-attention; causal attention ignores later positions."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        qkv = self.qkv(x).view(b, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(b, tokens, width))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and with a shortcut."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A class token, learned positions, `depth` layers, a norm and a linear head.

    ViT-S/16 is width 384, depth 12, 6 heads, patches of 16 on images of 224.

    Args:
        size: height and width of the images, a multiple of `patch`.
        patch: height and width of a patch.
        channels: channels of the images.
        classes: number of logits.
        width: width of the embedding, a multiple of `heads`.
        depth: number of layers, layers.0 to layers.{depth - 1}.
        heads: number of attention heads.
    """

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        channels: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])
