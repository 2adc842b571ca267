"""Residual networks with bottlenecks for 224 x 224 images (He et al. 2016, table 1)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["imagenet_resnet"]


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with a shortcut; the 3 x 3 one has the stride."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def imagenet_resnet(
    blocks: Sequence[int], width: int = 64, classes: int = 1000, channels: int = 3
) -> nn.Module:
    """Return ResNet-50 for (3, 4, 6, 3) blocks, ResNet-101 for (3, 4, 23, 3).

    Args:
        blocks: number of bottlenecks of each of the stages layer1, layer2, ...
        width: width of the first stage.
        classes: number of logits.
        channels: channels of the images.
    """
    model = nn.Sequential()
    model.add_module(
        "stem",
        nn.Sequential(
            nn.Conv2d(channels, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        ),
    )
    inside = width
    for i, count in enumerate(blocks):
        stage = []
        for j in range(count):
            stage.append(Bottleneck(inside, width * 2**i, 2 if i > 0 and j == 0 else 1))
            inside = 4 * width * 2**i
        model.add_module(f"layer{i + 1}", nn.Sequential(*stage))
    model.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("head", nn.Linear(inside, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
