"""The methods by name, each with its sampler, selector, norm and schedule."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from benchmarks.models.registry import MODELS
from esam_core import Direction
from esam_torch import (
    All,
    Batch,
    Bernoulli,
    Between,
    Every,
    Everything,
    Momentum,
    Only,
    Part,
    Previous,
    Proportional,
    Random,
    RandomSuffix,
    Suffix,
    TopIncrease,
    TopLoss,
)

__all__ = ["METHODS", "Method", "Schedule", "parse_method"]

#: Creates a sampler from beta and the name of the model, whose blocks it may cut at.
SamplerMaker = Callable[[str, float], object]


@dataclass(frozen=True)
class Schedule:
    """On which steps a method perturbs; the others are base steps.

    Args:
        every: perturb on every n-th step.
        last: perturb in this last share of the run, in (0, 1].
    """

    every: int = 1
    last: float = 1.0

    def wrap(self, sampler: object, steps: int) -> object:
        """Return the sampler restricted to this schedule, in a run of `steps` steps."""
        if self.every > 1:
            return Every(self.every, sampler)  # type: ignore[arg-type]
        if self.last < 1.0:
            return Between(steps - round(self.last * steps), None, sampler)  # type: ignore[arg-type]
        return sampler

    def share(self, steps: int) -> float:
        """Return the share of steps that perturb."""
        if self.every > 1:
            return -(-steps // self.every) / steps
        return round(self.last * steps) / steps


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Args:
        name: the name on the command line.
        title: the title in tables.
        family: "base", "average" (the base, tested with averaged weights), "esam" (any
            configuration of esam-torch) or "peer".
        perturb: creates the sampler; for "esam".
        select: creates the selector from gamma; for "esam".
        ascend: the ascent direction; for "esam".
        norm: the norm; "masked" enlarges the radius to rho / beta under random masks.
        schedule: on which steps to perturb.
        adaptive: scale the perturbation by the weights.
        budget: let the cost model choose sampler and selector for this cost; None to not do so.
        rho: the radius if the command line sets none; None uses the recipe's.
    """

    name: str
    title: str
    family: str = "esam"
    perturb: SamplerMaker = lambda _model, _beta: Everything()
    select: Callable[[float], object] = lambda _gamma: All()
    ascend: Direction = field(default_factory=Batch)
    norm: str = "masked"
    schedule: Schedule = Schedule()
    adaptive: bool = False
    budget: float | None = None
    rho: float | None = None

    @property
    def random(self) -> bool:
        """Whether masks, and with them the cost of a step, differ from step to step."""
        return self.perturb in (_bernoulli, _random_suffix)


def _bernoulli(_: str, beta: float) -> object:
    return Bernoulli(beta)


def _late(model: str, _: float) -> object:
    return Suffix(MODELS[model].late)


def _last(model: str, _: float) -> object:
    return Suffix(MODELS[model].last)


def _norm_late(model: str, _: float) -> object:
    return Only("norm", Suffix(MODELS[model].late))


def _random_suffix(model: str, _: float) -> object:
    return RandomSuffix((1.0, MODELS[model].late, MODELS[model].last), (0.1, 0.3, 0.6))


#: Momentum-SAM (Becker, Altrock and Risse 2024).
_MOMENTUM = Method("momentum", "momentum-SAM", ascend=Momentum())

_ALL = (
    Method("sgd", "base optimizer", "base"),
    Method("sgd-ema", "base optimizer, averaged weights", "average"),
    Method("sam", "SAM"),
    Method("peer-sam", "SAM of pytorch-optimizer", "peer"),
    Method("asam", "adaptive SAM", adaptive=True),
    Method("esam", "ESAM, as in the paper", perturb=_bernoulli, select=TopIncrease),
    Method(
        "esam-estimated",
        "ESAM, estimated norm",
        perturb=_bernoulli,
        select=TopIncrease,
        norm="estimated",
    ),
    Method("swp", "SWP alone", perturb=_bernoulli),
    Method("swp-estimated", "SWP alone, estimated norm", perturb=_bernoulli, norm="estimated"),
    Method("sds", "SDS alone", select=TopIncrease),
    Method("sds-loss", "all weights, top loss", select=TopLoss),
    Method("sds-random", "all weights, random half", select=Random),
    Method(
        "sds-proportional", "all weights, proportional to loss", select=lambda g: Proportional(g)
    ),
    Method(
        "sds-proportional-increase",
        "all weights, proportional to increase",
        select=lambda g: Proportional(g, "increase"),
    ),
    Method("suffix", "late suffix, all samples", perturb=_late),
    Method("suffix-sds", "late suffix, top increase", perturb=_late, select=TopIncrease),
    Method("suffix-loss", "late suffix, top loss", perturb=_late, select=TopLoss),
    Method(
        "suffix-proportional",
        "late suffix, proportional to loss",
        perturb=_late,
        select=lambda g: Proportional(g),
    ),
    Method(
        "half-suffix",
        "half of the work, proportional to loss",
        perturb=lambda _m, _b: Suffix(0.5),
        select=lambda g: Proportional(g),
    ),
    Method("last", "last stage, all samples", perturb=_last),
    Method("last-sds", "last stage, top increase", perturb=_last, select=TopIncrease),
    Method("last-loss", "last stage, top loss", perturb=_last, select=TopLoss),
    Method(
        "last-proportional",
        "last stage, proportional to loss",
        perturb=_last,
        select=lambda g: Proportional(g),
    ),
    Method("random-suffix", "one of three suffixes", perturb=_random_suffix, norm="estimated"),
    Method("norm", "norm layers alone", perturb=lambda _m, _b: Only("norm")),
    Method("norm-suffix", "norm layers of the late suffix", perturb=_norm_late),
    Method(
        "norm-suffix-sds",
        "norm layers of the late suffix, top increase",
        perturb=_norm_late,
        select=TopIncrease,
    ),
    Method("every10", "SAM on every 10th step", schedule=Schedule(every=10)),
    Method("every2", "SAM on every 2nd step", schedule=Schedule(every=2)),
    Method("late-phase", "SAM in the last 12% of the run", schedule=Schedule(last=0.12)),
    Method(
        "late-phase-suffix",
        "late suffix in the last half of the run",
        perturb=_late,
        schedule=Schedule(last=0.5),
    ),
    Method("budget", "budget of 1.15", budget=1.15),
    Method("empty", "ESAM with an empty mask", perturb=lambda _m, _b: Between(0, 0)),
    Method("part", "all weights along a quarter of the batch", ascend=Part(0.25)),
    Method(
        "suffix-part",
        "half suffix along a quarter of the batch",
        perturb=lambda _m, _b: Suffix(0.5),
        ascend=Part(0.25),
    ),
    Method("part-random", "half of the batch, random, in both", select=Random, ascend=Part(0.5)),
    Method("previous", "all weights along the previous gradient", ascend=Previous()),
    _MOMENTUM,
    replace(_MOMENTUM, name="momentum-adaptive", title="adaptive momentum-SAM", adaptive=True),
    # Former names, under which runs have been recorded, with a radius of the authors' size.
    replace(_MOMENTUM, name="msam", rho=3.0),
    replace(_MOMENTUM, name="msam-adaptive", title="adaptive momentum-SAM", adaptive=True, rho=3.0),
)

#: All methods by name.
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def parse_method(text: str) -> Method:
    """Return the method named "NAME" or "NAME@RHO".

    Raises:
        ValueError: the name is unknown, or rho is not a number >= 0.
    """
    name, _, rho = text.partition("@")
    if name not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Received: {name!r}.")
    if not rho:
        return METHODS[name]
    try:
        value = float(rho)
    except ValueError:
        value = -1.0
    if value < 0.0:
        raise ValueError(f"rho, after the @, must be a number >= 0. Received: {text!r}.")
    return replace(METHODS[name], rho=value)
