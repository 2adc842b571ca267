"""Networks to measure on."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or wide != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(wide, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR's ResNet-18 for a width of 64: four stages of two blocks, on (b, 3, 32, 32) images.

    Args:
        width: channels of the first stage; each stage doubles them.
        classes: number of logits.
    """

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.head = nn.Linear(8 * width, classes)

    @staticmethod
    def _stage(wide: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(wide, width, stride), BasicBlock(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.head(x.mean((2, 3)))
