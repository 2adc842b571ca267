"""The paper's training recipes (its tables 7 and 8).

rho, beta and gamma are `esam_core.presets`'. On ResNet-18 and WideResNet the paper gives SAM and
ESAM twice SGD's weight decay; `sharp_weight_decay=None` is the other choice, one for all.
"""

from dataclasses import dataclass
from typing import Any

from esam_core.presets import PRESETS

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; cosine decay, crop and mirror, in all of them.

    Args:
        preset: key of `esam_core.presets.PRESETS`.
        epochs: passes over the data.
        batch: samples a step.
        lr: peak learning rate.
        weight_decay: of the base optimizer alone.
        sharp_weight_decay: of SAM and ESAM.
        warmup: epochs.
        m: samples that one perturbation is for (m-sharpness); None is the batch.
        optimizer: the base.
    """

    preset: str
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    sharp_weight_decay: float
    warmup: int = 0
    m: int | None = None
    optimizer: str = "sgd"

    def fields(self, *, same_weight_decay: bool = False) -> dict[str, Any]:
        """Return the fields of a `Run` that the recipe settles.

        Args:
            same_weight_decay: give SAM and ESAM the base optimizer's.
        """
        values = {name: value for name, value in vars(self).items() if name != "preset"}
        if same_weight_decay:
            values["sharp_weight_decay"] = None
        return {**values, **PRESETS[self.preset].arguments()}


#: By the name of the model in `benchmarks.models`.
RECIPES: dict[str, Recipe] = {
    "resnet18": Recipe("cifar-resnet18", 200, 128, 0.05, 5e-4, 1e-3),
    "wrn28-10": Recipe("cifar-wrn28-10", 200, 256, 0.05, 5e-4, 1e-3),
    "pyramidnet110": Recipe("cifar-pyramidnet110", 300, 256, 0.1, 5e-4, 5e-4),
    "resnet50": Recipe("imagenet-resnet50", 90, 512, 0.2, 1e-4, 1e-4, m=128),
    "resnet101": Recipe("imagenet-resnet101", 90, 512, 0.2, 1e-4, 1e-4, m=128),
    "vit-s16": Recipe(
        *("imagenet-vit-s16", 300, 512, 3e-3, 0.3, 0.3), warmup=30, m=128, optimizer="adamw"
    ),
}
