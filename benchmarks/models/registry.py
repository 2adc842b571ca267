"""Networks by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.models.imagenet_resnet import imagenet_resnet
from benchmarks.models.pyramidnet import PyramidNet
from benchmarks.models.resnet import ResNet
from benchmarks.models.text import TextTransformer
from benchmarks.models.vit import ViT
from benchmarks.models.wide_resnet import WideResNet

__all__ = ["MODELS", "TEXT_MODELS", "Model", "build"]


@dataclass(frozen=True)
class Model:
    """How to create a network, and the names of its last blocks.

    Args:
        make: called with (classes, channels, size, width); a width of None is the published one.
        late: name of the block at which about the last third of the network starts.
        last: name of the last block before the head.
    """

    make: Callable[[int, int, int, int | None], nn.Module]
    late: str
    last: str


MODELS: dict[str, Model] = {
    "resnet18": Model(
        lambda k, c, _, w: ResNet((2, 2, 2, 2), w or 64, k, c), late="layer3", last="layer4"
    ),
    "resnet10": Model(
        lambda k, c, _, w: ResNet((1, 1, 1, 1), w or 64, k, c), late="layer3", last="layer4"
    ),
    "resnet20": Model(
        lambda k, c, _, w: ResNet((3, 3, 3), w or 16, k, c), late="layer2", last="layer3"
    ),
    "resnet8": Model(
        lambda k, c, _, w: ResNet((1, 1, 1), w or 16, k, c), late="layer2", last="layer3"
    ),
    "wrn28-10": Model(
        lambda k, c, _, w: WideResNet(28, w or 10, k, c), late="layer2", last="layer3"
    ),
    "wrn16-4": Model(lambda k, c, _, w: WideResNet(16, w or 4, k, c), late="layer2", last="layer3"),
    "pyramidnet110": Model(
        lambda k, c, _, w: PyramidNet(110, w or 270, k, c), late="layer2", last="layer3"
    ),
    "vit-small-cifar": Model(
        lambda k, c, s, w: ViT(
            size=s, patch=max(1, s // 8), channels=c, classes=k, width=w or 192, depth=6, heads=3
        ),
        late="layers.4",
        last="layers.5",
    ),
    "resnet50": Model(
        lambda k, c, _, w: imagenet_resnet((3, 4, 6, 3), w or 64, k, c),
        late="layer3",
        last="layer4",
    ),
    "resnet101": Model(
        lambda k, c, _, w: imagenet_resnet((3, 4, 23, 3), w or 64, k, c),
        late="layer3",
        last="layer4",
    ),
    "vit-s16": Model(
        lambda k, c, s, w: ViT(
            size=s, patch=16, channels=c, classes=k, width=w or 384, depth=12, heads=6
        ),
        late="layers.8",
        last="layers.11",
    ),
}

#: Networks whose inputs are the symbols of a text, with logits at every position.
TEXT_MODELS: dict[str, Model] = {
    "bytes-transformer": Model(
        lambda k, _c, s, w: TextTransformer(symbols=k, length=s, width=w or 64, depth=4, heads=4),
        late="layers.2",
        last="layers.3",
    ),
}


def build(
    name: str, *, classes: int, channels: int = 3, size: int = 32, width: int | None = None
) -> nn.Module:
    """Return a network by its name, with new random weights.

    Args:
        name: a key of `MODELS` or `TEXT_MODELS`.
        classes: number of logits.
        channels: channels of the images.
        size: height and width of the images, or length of the passages.
        width: channels of the first stage (ResNets), the widening factor (WRN), alpha
            (PyramidNet) or the embedding (ViT); None is the published one.
    """
    known = MODELS | TEXT_MODELS
    if name not in known:
        raise ValueError(f"`model` must be one of {', '.join(known)}. Received: {name!r}.")
    return known[name].make(classes, channels, size, width)
