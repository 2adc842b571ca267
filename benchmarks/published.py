"""The numbers printed in the paper (Du et al., ICLR 2022), for comparison with ours.

Accuracies are in percent, with the printed errors; speeds are in images per second, on the authors'
machines.
"""

from dataclasses import dataclass

__all__ = ["PUBLISHED", "SAVINGS", "SAVINGS_CONSTANTS", "Published", "published"]


@dataclass(frozen=True)
class Published:
    """The paper's numbers for one cell.

    Args:
        accuracy: percent.
        images_per_second: the speed on the authors' machine.
        error: the error of the accuracy, or None if not printed.
    """

    accuracy: float
    images_per_second: int
    error: float | None = None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.accuracy:.2f}{error}"


_Cells = dict[tuple[str, str, str], Published]

#: CIFAR, best test accuracy over 3 seeds.
_TABLE1: _Cells = {
    ("cifar10", "resnet18", "sgd"): Published(95.41, 3387, 0.03),
    ("cifar10", "resnet18", "sam"): Published(96.52, 1717, 0.13),
    ("cifar10", "resnet18", "esam"): Published(96.56, 2409, 0.08),
    ("cifar100", "resnet18", "sgd"): Published(78.17, 3483, 0.05),
    ("cifar100", "resnet18", "sam"): Published(80.17, 1730, 0.17),
    ("cifar100", "resnet18", "esam"): Published(80.41, 2423, 0.10),
    ("cifar10", "wrn28-10", "sgd"): Published(96.34, 801, 0.12),
    ("cifar10", "wrn28-10", "sam"): Published(97.27, 396, 0.11),
    ("cifar10", "wrn28-10", "esam"): Published(97.29, 550, 0.11),
    ("cifar100", "wrn28-10", "sgd"): Published(81.56, 792, 0.13),
    ("cifar100", "wrn28-10", "sam"): Published(83.42, 391, 0.04),
    ("cifar100", "wrn28-10", "esam"): Published(84.51, 545, 0.01),
    ("cifar10", "pyramidnet110", "sgd"): Published(96.62, 580, 0.10),
    ("cifar10", "pyramidnet110", "sam"): Published(97.30, 289, 0.10),
    ("cifar10", "pyramidnet110", "esam"): Published(97.81, 401, 0.01),
    ("cifar100", "pyramidnet110", "sgd"): Published(81.89, 555, 0.17),
    ("cifar100", "pyramidnet110", "sam"): Published(84.46, 276, 0.04),
    ("cifar100", "pyramidnet110", "esam"): Published(85.56, 381, 0.05),
}

#: The paper's tables by the name of the command; cells by (data, model, method).
PUBLISHED: dict[str, _Cells] = {
    "table1": _TABLE1,
    "table2": {  # the accuracies of SGD and SAM are those of Chen et al. 2021
        ("imagenet", "resnet50", "sgd"): Published(76.00, 1327),
        ("imagenet", "resnet50", "sam"): Published(76.70, 654),
        ("imagenet", "resnet50", "esam"): Published(77.05, 846),
        ("imagenet", "resnet101", "sgd"): Published(77.80, 891),
        ("imagenet", "resnet101", "sam"): Published(78.60, 438),
        ("imagenet", "resnet101", "esam"): Published(79.09, 564),
    },
    "table3": {  # SGD and SAM are in table 1
        **{k: v for k, v in _TABLE1.items() if k[1] != "pyramidnet110" and k[2] != "esam"},
        ("cifar10", "resnet18", "swp"): Published(96.74, 1896),
        ("cifar100", "resnet18", "swp"): Published(80.53, 1887),
        ("cifar10", "resnet18", "sds"): Published(96.45, 2105),
        ("cifar100", "resnet18", "sds"): Published(80.38, 2103),
        ("cifar10", "resnet18", "esam"): Published(96.56, 2409),
        ("cifar100", "resnet18", "esam"): Published(80.41, 2423),
        ("cifar10", "wrn28-10", "swp"): Published(97.37, 430),
        ("cifar100", "wrn28-10", "swp"): Published(84.44, 423),
        ("cifar10", "wrn28-10", "sds"): Published(97.24, 495),
        ("cifar100", "wrn28-10", "sds"): Published(84.46, 492),
        ("cifar10", "wrn28-10", "esam"): Published(97.29, 551),
        ("cifar100", "wrn28-10", "esam"): Published(84.51, 545),
    },
    "table6": {
        ("imagenet", "vit-s16", "sgd"): Published(79.72, 1133),
        ("imagenet", "vit-s16", "sam"): Published(80.34, 581),
        ("imagenet", "vit-s16", "swp"): Published(80.88, 616),
        ("imagenet", "vit-s16", "sds"): Published(79.97, 693),
        ("imagenet", "vit-s16", "esam"): Published(80.46, 734),
    },
}

#: g(N, beta), the share that SWP saves of the time of an ascent pass, by table, N and beta, as
#: printed in tables 4 and 5. The paper's fits use more rows. Where table 5 has 25, the text has 35.
SAVINGS: dict[str, dict[int, dict[float, float]]] = {
    "table4": {
        50: {0.9: 0.0342, 0.5: 0.1628, 0.1: 0.3008},
        75: {0.9: 0.0344, 0.5: 0.1579, 0.1: 0.3042},
        100: {0.9: 0.0337, 0.5: 0.1586, 0.1: 0.2956},
        125: {0.9: 0.0294, 0.5: 0.1487, 0.1: 0.2942},
    },
    "table5": {
        25: {0.9: 0.0288, 0.5: 0.1554, 0.1: 0.3003},
        50: {0.9: 0.0234, 0.5: 0.1510, 0.1: 0.2983},
        65: {0.9: 0.0223, 0.5: 0.1495, 0.1: 0.2922},
        75: {0.9: 0.0222, 0.5: 0.1510, 0.1: 0.2868},
    },
}

#: k1 and k2 as printed in tables 4 and 5.
SAVINGS_CONSTANTS: dict[str, tuple[float, float]] = {
    "table4": (0.3185, 0.1310),
    "table5": (0.3143, 0.0737),
}


def published(table: str, data: str, model: str, method: str) -> Published | None:
    """Return the paper's numbers for a cell of a table, or None.

    Args:
        table: the command's name, such as "table1".
        data: "cifar10", "cifar100" or "imagenet".
        model: a key of `MODELS`.
        method: a method's name; with its own radius it is not in the paper.
    """
    return PUBLISHED.get(table, {}).get((data, model, method))
