"""The paper's training recipes (its tables 7 and 8), and one for ViT-S/16, which it does not print.

rho, beta and gamma are from `esam_core.presets`. On ResNet-18 and WideResNet the paper uses twice
SGD's weight decay for SAM and ESAM; `sharp_weight_decay=None` uses the same for all.
"""

from dataclasses import dataclass
from typing import Any

from esam_core.presets import PRESETS

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How one network is trained, always with cosine decay, random crops and mirroring.

    Args:
        preset: key of `esam_core.presets.PRESETS`.
        epochs: passes over the data.
        batch: samples per step.
        lr: peak learning rate.
        weight_decay: weight decay of the base optimizer alone.
        sharp_weight_decay: weight decay of SAM and ESAM.
        warmup: epochs of warm-up.
        m: samples per perturbation (m-sharpness); None is the batch.
        optimizer: the base optimizer.
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
        """Return the fields of a `Run` that the recipe sets.

        Args:
            same_weight_decay: use the base optimizer's for SAM and ESAM too.
        """
        values = {name: value for name, value in vars(self).items() if name != "preset"}
        if same_weight_decay:
            values["sharp_weight_decay"] = None
        return {**values, **PRESETS[self.preset].arguments()}


#: Recipes by the name of the model in `benchmarks.models`.
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
