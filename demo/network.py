"""The demo's network: four convolutions with BatchNorm, in named blocks."""

from torch import Tensor, nn

__all__ = ["Network"]


def _block(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    """Return convolution, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Network(nn.Module):
    """A network with about 0.25 million weights.

    Args:
        channels: channels of the images.
        classes: number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = _block(channels, 32, 1)
        self.early = _block(32, 64, 1)
        self.middle = _block(64, 128, 2)
        self.late = _block(128, 128, 1)
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.middle(self.early(self.stem(x))))
        return self.head(x.mean((2, 3)))
