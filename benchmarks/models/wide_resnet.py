"""Wide residual networks (Zagoruyko and Komodakis 2016)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WideResNet"]


class PreactivatedBlock(nn.Module):
    """Norm and ReLU before each of two convolutions; a changed shape is projected after them."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inside != width:
            self.shortcut = nn.Conv2d(inside, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-widen without dropout.

    Args:
        depth: 6 n + 4 layers, in three stages of n blocks, layer1 to layer3.
        widen: factor on the widths 16, 32, 64.
        classes: number of logits.
        channels: channels of the images.
    """

    def __init__(self, depth: int, widen: int, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        count = (depth - 4) // 6
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        inside = 16
        for i in range(3):
            width = 16 * widen * 2**i
            stage = []
            for j in range(count):
                stage.append(PreactivatedBlock(inside, width, 2 if i > 0 and j == 0 else 1))
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
