"""The settings of docs/study-protocol.md: data, networks, start cells, budgets and seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.run import Run

__all__ = ["CONTENDERS", "METHODS", "QUICK", "SETTINGS", "Cell", "Setting"]

#: The methods in tuning order, with the cost of a step in steps of SGD. The cost determines how
#: many epochs a budget buys. The actual cost of a run is counted and is in its record.
METHODS: dict[str, float] = {
    "sgd": 1.0,
    "sam": 2.0,
    "suffix-part": 1.154,
    "esam": 1.684,
    "half-suffix": 1.115,
    "sgd-ema": 1.0,
    "part": 1.25,
    "part-random": 1.0,
    "previous": 1.0,
    "momentum": 1.0,
}

#: The field of a `Run` that is tuned in addition to batch size and learning rate.
STRENGTHS: dict[str, str] = {
    method: "ema" if method == "sgd-ema" else "rho" for method in METHODS if method != "sgd"
}


#: The methods of the two frontiers, and the one that is compared with them at every budget.
CONTENDERS = ("sgd", "sam", "suffix-part")

#: The contenders, the paper's method and the control that costs nothing.
COMPARED = (*CONTENDERS, "esam", "sgd-ema")


@dataclass(frozen=True)
class Cell:
    """The hyperparameters that are tuned.

    Args:
        batch: the batch size.
        lr: the peak learning rate.
        strength: rho, or the share of the new weights in an average; 0 if the method has neither.
    """

    batch: int
    lr: float
    strength: float = 0.0

    @classmethod
    def of(cls, run: Run) -> "Cell":
        """Return the cell of a run."""
        strength = run.ema if run.method == "sgd-ema" else run.effective_rho
        return cls(run.batch, run.lr, strength)

    def neighbours(self) -> list["Cell"]:
        """Return the cells with one value halved or doubled, with batch sizes from 8 to 128."""
        found = []
        for factor in (0.5, 2.0):
            batch = round(self.batch * factor)
            if 8 <= batch <= 128:
                found.append(replace(self, batch=batch))
            found.append(replace(self, lr=self.lr * factor))
            if self.strength:
                found.append(replace(self, strength=self.strength * factor))
        return found


def _grid(method: str) -> tuple[Cell, ...]:
    """Return the start cells of a method whose tuning begins with a grid."""
    batches = (16, 32, 64)
    if method == "sgd":
        return tuple(Cell(b, lr) for b in batches for lr in (0.0125, 0.025, 0.05, 0.1, 0.2))
    return tuple(Cell(b, 0.05, b / part) for b in batches for part in (640, 320, 160))


def _starts(lr: float, batches: tuple[int, ...] = (16, 32)) -> dict[str, tuple[Cell, ...]]:
    """Return the start cells of all methods: one per batch size, or three for "momentum"."""
    strengths: dict[str, tuple[float, ...]] = {
        "sgd": (0.0,),
        "momentum": (1 / 320, 1 / 80, 1 / 20),  # its authors use a much larger rho than SAM's
    }
    return {
        method: tuple(
            Cell(batch, lr, 0.02 if method == "sgd-ema" else batch * strength)
            for batch in batches
            for strength in strengths.get(method, (1 / 320,))
        )
        for method in METHODS
    }


#: The cells that tuning chose in "small" at budget 20, each with the best of another batch size.
_CHOSEN_IN_SMALL: dict[str, tuple[Cell, ...]] = {
    "sgd": (Cell(16, 0.1), Cell(8, 0.1)),
    "sam": (Cell(16, 0.05, 0.05), Cell(8, 0.05, 0.05)),
    "suffix-part": (Cell(8, 0.05, 0.4), Cell(16, 0.1, 0.4)),
    "esam": (Cell(32, 0.05, 0.0125), Cell(64, 0.025, 0.025)),
    "sgd-ema": (Cell(8, 0.1, 0.02), Cell(16, 0.1, 0.01)),
}


#: The cells that tuning chose in "small" at budget 10.
_CHOSEN_AT_10: dict[str, tuple[Cell, ...]] = {
    "sgd": (Cell(8, 0.05),),
    "sam": (Cell(32, 0.05, 0.05),),
    "suffix-part": (Cell(16, 0.05, 0.2),),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of the study.

    Args:
        name: its name on the command line.
        title: its name in tables.
        words: its name in figures.
        shared: fields that all runs have in common.
        main: the budget at which all methods are tuned and compared.
        budgets: the budgets at which methods are compared: costs of a run in epochs of SGD.
        base_budgets: further budgets of the base optimizer alone, for its frontier.
        tuning_seeds: the first is for the climb; the others confirm the best cells. If there are
            none, the first start cell is used as it is.
        seeds: the seeds of the reported runs.
        starts: the start cells at the main budget, by method.
        restarts: the start cells at other budgets, by budget and method. The default is the cell
            that was chosen at the main budget.
        methods: keys of `METHODS`.
        everywhere: those that are tuned and compared at each budget.
        also: methods, budgets and cells that are reported in addition to the chosen ones.
        base: the name of the base optimizer.
        costs: costs of a step that differ from `METHODS`.
    """

    name: str
    title: str
    words: str
    shared: Mapping[str, Any]
    main: int
    budgets: tuple[int, ...]
    base_budgets: tuple[int, ...] = ()
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    starts: Mapping[str, tuple[Cell, ...]]
    restarts: Mapping[int, Mapping[str, tuple[Cell, ...]]] = field(default_factory=dict)
    methods: tuple[str, ...] = tuple(METHODS)
    everywhere: tuple[str, ...] = CONTENDERS
    also: tuple[tuple[str, int, Cell], ...] = ()
    base: str = "SGD"
    costs: Mapping[str, float] = field(default_factory=dict)

    def points(self) -> list[tuple[str, int]]:
        """Return the methods and budgets to tune and report, the most important first."""
        found = [
            (method, budget)
            for budget in self.budgets
            for method in self.methods
            if budget == self.main or method in self.everywhere
        ]
        found += [("sgd", budget) for budget in self.base_budgets]
        return sorted(found, key=lambda point: self.stage(*point))  # sorting is stable

    def stage(self, method: str, budget: int) -> tuple[int, ...]:
        """Return a key that sorts points by importance: contenders and the main budget first."""
        away = budget != self.main
        last = away and method not in COMPARED  # they decide nothing
        return (method not in CONTENDERS, last, away, budget)

    def epochs(self, method: str, budget: int) -> int:
        """Return the epochs that a budget buys for a method."""
        return max(1, round(budget / self.cost(method)))

    def cost(self, method: str) -> float:
        """Return the cost of a method's step in steps of the base optimizer."""
        return self.costs.get(method, METHODS[method])

    def run(self, method: str, cell: Cell, budget: int, seed: int) -> Run:
        """Return a run of a method, with as many epochs as a budget buys.

        Args:
            method: a key of `METHODS`.
            cell: its hyperparameters.
            budget: in epochs of SGD.
            seed: the seed of the run.
        """
        epochs = self.epochs(method, budget)
        options = {**self.shared, "batch": cell.batch, "lr": cell.lr}
        if method in STRENGTHS:
            options[STRENGTHS[method]] = cell.strength
        tested = max(1, round(epochs / 4))
        return Run(method=method, seed=seed, epochs=epochs, test_every=tested, **options)


_SMALL = {
    "data": "cifar100",
    "classes": 20,
    "images": 4000,
    "spare": True,
    "size": 16,
    "model": "resnet10",
    "width": 16,
    "augment": False,
    "device": "cpu",
    "channels_last": True,
}


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            name="small",
            title="4,000 images of 20 classes of CIFAR-100, 16 x 16, ResNet-10 of width 16",
            words="4,000 images of 20 classes of CIFAR-100",
            shared=_SMALL,
            main=20,
            budgets=(10, 20, 40),
            base_budgets=(5, 7, 14),
            tuning_seeds=(100, 101),
            seeds=tuple(range(10)),
            starts=_starts(0.05) | {name: _grid(name) for name in ("sgd", "sam", "half-suffix")},
            restarts={10: {name: _CHOSEN_IN_SMALL[name] for name in CONTENDERS}},
            everywhere=tuple(METHODS),
            also=(("sgd", 40, _CHOSEN_IN_SMALL["sgd"][0]),),  # better on three seeds
        ),
        Setting(
            name="fresh",
            title="as small, with 20 other classes and nothing tuned",
            words="20 other classes of CIFAR-100, nothing tuned",
            shared={**_SMALL, "first_class": 20},
            main=20,
            budgets=(10, 20),
            base_budgets=(14,),
            tuning_seeds=(),
            seeds=tuple(range(10)),
            starts=_CHOSEN_IN_SMALL,
            restarts={10: _CHOSEN_AT_10, 14: {"sgd": (Cell(8, 0.1),)}},
            methods=CONTENDERS,
            also=(("sgd", 10, _CHOSEN_IN_SMALL["sgd"][0]),),  # its best point in "small"
        ),
        Setting(
            name="noisy",
            title="as small, 30 % of the training labels wrong",
            words="30 % of the training labels wrong",
            shared={**_SMALL, "noise": 0.3},
            main=20,
            budgets=(10, 20, 40),
            base_budgets=(5, 7, 14),
            tuning_seeds=(100, 101),
            seeds=tuple(range(8)),
            starts=_CHOSEN_IN_SMALL,
            restarts={10: _CHOSEN_AT_10},
            methods=COMPARED,
        ),
        Setting(
            name="text",
            title="128 KB of Python's language reference, transformer of 4 layers and width 64",
            words="Text: the next byte of Python's language reference",
            shared={
                "data": "pydoc",
                "images": 131072,
                "size": 64,
                "model": "bytes-transformer",
                "optimizer": "adamw",
                "weight_decay": 0.01,
                "device": "cpu",
            },
            main=20,
            budgets=(10, 20, 40),
            tuning_seeds=(100, 101),
            seeds=(0, 1, 2, 3, 4),
            starts=_starts(0.001),
            methods=COMPARED,
            base="AdamW",
            costs={"suffix-part": 1.133, "esam": 1.727},
        ),
        Setting(
            name="wide",
            title="as small, width 32, cropped and mirrored",
            words="A wider network, images cropped and mirrored",
            shared={**_SMALL, "width": 32, "augment": True},
            main=120,
            budgets=(120,),
            base_budgets=(30, 60),
            tuning_seeds=(100,),
            seeds=(0, 1, 2, 3),
            starts=_CHOSEN_IN_SMALL,
            restarts={budget: {"sgd": _CHOSEN_IN_SMALL["sgd"]} for budget in (30, 60)},
            methods=(*CONTENDERS, "esam"),
        ),
        Setting(
            name="full",
            title="all of CIFAR-100, ResNet-18, nothing tuned",
            words="All of CIFAR-100, ResNet-18, nothing tuned",
            shared={
                "data": "cifar100",
                "model": "resnet18",
                "device": "cuda",
                "bf16": True,
                "channels_last": True,
            },
            main=50,
            budgets=(50, 100, 200),
            tuning_seeds=(),
            seeds=(0, 1, 2),
            starts={
                "sgd": (Cell(128, 0.05),),
                "sam": (Cell(128, 0.05, 0.05),),
                "suffix-part": (Cell(128, 0.05, 0.2),),
                "esam": (Cell(128, 0.05, 0.05),),
                "sgd-ema": (Cell(128, 0.05, 0.005),),
            },
            methods=COMPARED,
            everywhere=COMPARED,
            costs={"suffix-part": 1.161, "esam": 1.7},
        ),
    )
}

#: For `--quick` and the tests. It shows only that the study runs.
QUICK = Setting(
    name="quick",
    title="150 digits, ResNet-8 of width 2",
    words="150 digits",
    shared={"data": "digits", "images": 150, "model": "resnet8", "width": 2, "device": "cpu"},
    main=2,
    budgets=(2, 4),
    tuning_seeds=(100, 101),
    seeds=(0, 1),
    starts=_starts(0.05),
)
