"""Small networks that make skipping hard: code between blocks, tokens, a shared block."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from esam_torch import ESAM


class Residual(nn.Module):
    """A basic residual block with functional operations."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and width_in == width
            else nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 for 32 x 32 images; the full width is 64."""

    def __init__(self, width: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for i, stride in enumerate((1, 2, 2, 2), start=1):
            stage = [Residual(widths[i - 1], widths[i], stride), Residual(widths[i], widths[i], 1)]
            if dropout:
                stage.insert(1, nn.Dropout(dropout))
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """A small ViT-like model: a class token and position embeddings used between the blocks."""

    def __init__(self, depth: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Twice(nn.Module):
    """One block called before and after another, with in-place operations in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8)
        self.tail = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x += 1.0
        x = self.shared(x)
        x = torch.tanh(self.tail(x))
        x = self.shared(x)
        return self.head(x)


def images(b: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, 3, 32, 32, generator=generator), torch.arange(b) % 10


def tokens(b: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, 4, 8, generator=generator), torch.arange(b) % 10


def vectors(b: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, 8, generator=generator), torch.arange(b) % 10


def flops(
    model: nn.Module, batch: tuple[torch.Tensor, ...], steps: int = 1, momentum=0.0, **options
) -> float:
    """Return the mean number of operations per step, without those of the first step's checks."""

    def losses(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(inputs), targets, reduction="none")

    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum), model, **options
    )
    for _ in range(2):  # the first step with `Previous` or `Momentum` is a base step
        optimizer.step(losses, *batch)
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            optimizer.step(losses, *batch)
    return counter.get_total_flops() / steps
