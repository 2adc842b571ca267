"""Pyramidal residual networks (Han et al. 2017), additive, with basic blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PyramidNet"]


class PyramidBlock(nn.Module):
    """Norm, convolution, norm, ReLU, convolution, norm; the shortcut is padded with zeros."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.stride = stride
        self.extra = width - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm3(self.conv2(F.relu(self.norm2(self.conv1(self.norm1(x))))))
        if self.stride != 1:
            x = F.avg_pool2d(x, self.stride)
        return y + F.pad(x, (0, 0, 0, 0, 0, self.extra))


class PyramidNet(nn.Module):
    """Widths grow by alpha / blocks with each block, from 16 to 16 + alpha.

    Args:
        depth: 6 n + 2 layers, in three stages of n blocks, layer1 to layer3.
        alpha: the total growth of the width.
        classes: number of logits.
        channels: channels of the images.
    """

    def __init__(self, depth: int, alpha: int, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        )
        inside = 16
        for i in range(3):
            stage = []
            for j in range(count):
                width = round(16 + alpha * (i * count + j + 1) / (3 * count))
                stage.append(PyramidBlock(inside, width, 2 if i > 0 and j == 0 else 1))
                inside = width
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.norm = nn.BatchNorm2d(inside)
        self.head = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1), 1))
