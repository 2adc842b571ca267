"""Residual networks for small images (He et al. 2016, section 4.2, and its common wide form)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut, which is projected if the shape changes."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of basic blocks; each stage after the first halves the image and doubles the width.

    ResNet-18 is (2, 2, 2, 2) of width 64, ResNet-20 is (3, 3, 3) of width 16.

    Args:
        blocks: number of blocks of each stage; the stages are called layer1, layer2, ...
        width: channels of the first stage.
        classes: number of logits.
        channels: channels of the images.
    """

    def __init__(
        self, blocks: Sequence[int], width: int = 64, classes: int = 10, channels: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = [f"layer{i}" for i in range(1, len(blocks) + 1)]
        inside, wide = width, width
        for i, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stage = []
            for j in range(count):
                stage.append(BasicBlock(inside, wide, 2 if i > 0 and j == 0 else 1))
                inside = wide
            self.add_module(name, nn.Sequential(*stage))
            wide *= 2
        self.head = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
