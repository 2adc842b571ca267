"""The paper's settings, by name.

Source: Du et al., ICLR 2022 (arXiv 2110.03141), section 3.1 and tables 7 and 8. The authors'
training script (`run.sh` at github.com/dydjw9/Efficient_SAM) trains the CIFAR networks; each preset
notes where its values differ from the paper's.
"""

from dataclasses import dataclass
from typing import TypedDict

from esam_core import validation

__all__ = ["PRESETS", "Arguments", "Preset"]


class Arguments(TypedDict):
    """A preset as keyword arguments for `ESAM(...)`; type checkers accept `**arguments`."""

    rho: float
    beta: float
    gamma: float


@dataclass(frozen=True)
class Preset:
    """ESAM's hyperparameters for one network.

    Args:
        network: the network and data set.
        rho: the perturbation radius.
        beta: share of the parameter tensors perturbed.
        gamma: share of the samples kept.
        rho_is_ours: True if the paper gives no rho for this network and we chose one.
        source: where the values come from, and whether the authors' script agrees.

    Example:
        >>> PRESETS["imagenet-resnet50"].arguments()
        {'rho': 0.05, 'beta': 0.6, 'gamma': 0.7}
    """

    network: str
    rho: float
    beta: float
    gamma: float
    rho_is_ours: bool = False
    source: str = "the paper; the authors' script agrees"

    def __post_init__(self) -> None:
        validation.nonnegative("rho", self.rho)
        validation.open_unit("beta", self.beta)
        validation.open_unit("gamma", self.gamma)

    def arguments(self) -> Arguments:
        """Return the keyword arguments for `ESAM(...)`."""
        return {"rho": self.rho, "beta": self.beta, "gamma": self.gamma}


_PAPER_ONLY = "the paper; not in the authors' script"

#: Presets by name: data set and network.
PRESETS: dict[str, Preset] = {
    "cifar-resnet18": Preset("ResNet-18 on CIFAR-10/100", rho=0.05, beta=0.6, gamma=0.5),
    "cifar-wrn28-10": Preset("WideResNet-28-10 on CIFAR-10/100", rho=0.1, beta=0.5, gamma=0.5),
    "cifar-pyramidnet110": Preset(
        "PyramidNet-110 on CIFAR-10/100",
        rho=0.2,
        beta=0.6,
        gamma=0.5,
        source="the paper; the authors' script has beta=0.5",
    ),
    "imagenet-resnet50": Preset(
        "ResNet-50 on ImageNet", rho=0.05, beta=0.6, gamma=0.7, source=_PAPER_ONLY
    ),
    "imagenet-resnet101": Preset(
        "ResNet-101 on ImageNet", rho=0.05, beta=0.6, gamma=0.7, source=_PAPER_ONLY
    ),
    "imagenet-vit-s16": Preset(
        "ViT-S/16 on ImageNet",
        rho=0.2,
        beta=0.5,
        gamma=0.7,
        rho_is_ours=True,
        source="beta and gamma: the paper; rho: ours; not in the authors' script",
    ),
}
