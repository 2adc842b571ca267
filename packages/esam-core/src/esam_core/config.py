"""Hyperparameters, validated once for every backend."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from esam_core import directions, samplers, schedules, selectors, validation
from esam_core.errors import ESAMTypeError, ESAMValueError
from esam_core.perturbation import NORMS, Norm

__all__ = ["ON_NONFINITE", "ESAMConfig", "OnNonfinite", "component_from_dict", "component_to_dict"]

#: What to do when a loss or a gradient, of the ascent or the descent, is not finite. "propagate":
#: the non-finite values reach the gradients, and epsilon is 0 if the ascent gradient is not finite;
#: no device synchronisation. "skip": leave the gradients as they are. "raise": raise
#: NonFiniteError. The last two cost one device synchronisation per step.
OnNonfinite = Literal["propagate", "skip", "raise"]

#: The values of `OnNonfinite`.
ON_NONFINITE: tuple[OnNonfinite, ...] = get_args(OnNonfinite)

_COMPONENTS = {
    cls.__name__: cls
    for cls in (
        samplers.Bernoulli,
        samplers.Everything,
        samplers.Suffix,
        samplers.RandomSuffix,
        samplers.Only,
        schedules.Every,
        schedules.Between,
        schedules.Sometimes,
        selectors.TopIncrease,
        selectors.TopLoss,
        selectors.Random,
        selectors.Proportional,
        selectors.All,
        directions.Batch,
        directions.Part,
        directions.Previous,
        directions.Momentum,
    )
}


def component_to_dict(component: Any) -> dict[str, Any] | None:
    """Return a sampler, selector or direction as data; None if it cannot be converted.

    Example:
        >>> component_to_dict(schedules.Every(10, samplers.Bernoulli(0.5)))["inner"]
        {'name': 'Bernoulli', 'beta': 0.5, 'unit': 'tensor'}
    """
    name = type(component).__name__
    if _COMPONENTS.get(name) is not type(component):
        return None
    data: dict[str, Any] = {"name": name}
    for spec in dataclasses.fields(component):
        value = getattr(component, spec.name)
        if spec.name == "inner":
            value = component_to_dict(value)
            if value is None:
                return None
        elif callable(value):
            return None
        data[spec.name] = list(value) if isinstance(value, tuple) else value
    return data


def component_from_dict(data: Mapping[str, Any]) -> Any:
    """Return the sampler, selector or direction that `component_to_dict` described.

    Args:
        data: its "name", and its arguments by name.

    Raises:
        ESAMTypeError: `data`, or a nested sampler in it, is not a mapping, or a value has the wrong
            type.
        ESAMValueError: the name is unknown, a required argument is missing, an argument is unknown,
            or a value is invalid.

    Example:
        >>> component_from_dict({"name": "Only", "kind": "norm", "inner": {"name": "Bernoulli"}})
        Only(kind='norm', inner=Bernoulli(beta=0.6, unit='tensor'))
    """
    return _component("data", data)


def _component(label: str, data: Any) -> Any:
    """Return the component that `data` describes; errors refer to it by its label."""
    arguments = _mapping(label, data)
    name = validation.choice("name", arguments.pop("name", None), _COMPONENTS)
    specs = dataclasses.fields(_COMPONENTS[name])
    required = [
        spec.name
        for spec in specs
        if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
    ]
    _check_keys(label, arguments, required, [spec.name for spec in specs], of=f" of a {name}")
    for key, value in arguments.items():
        if key == "inner":
            arguments[key] = _component("inner", value)
        elif isinstance(value, list):
            arguments[key] = tuple(value)
    return _COMPONENTS[name](**arguments)


def _mapping(label: str, data: Any) -> dict[str, Any]:
    """Return a copy of a mapping."""
    if not isinstance(data, Mapping):
        raise ESAMTypeError(
            f"`{label}` must be a mapping, as `to_dict` writes it. Received: {label}={data!r}."
        )
    return dict(data)


def _check_keys(
    label: str,
    data: Mapping[str, Any],
    required: Collection[str],
    known: Collection[str],
    *,
    of: str = "",
) -> None:
    """Raise ESAMValueError if a required key is missing or a key is unknown."""
    if all(key in data for key in required) and all(key in known for key in data):
        return
    accepted = ", ".join(map(repr, known)) or "nothing"
    needed = ", ".join(map(repr, required)) or "none"
    raise ESAMValueError(
        f"`{label}`{of} accepts {accepted}; required: {needed}. "
        f"Received: {label} with {', '.join(map(repr, data)) or 'nothing'}."
    )


@dataclass(frozen=True, kw_only=True)
class ESAMConfig:
    """All hyperparameters of ESAM, validated. Backends create it with `from_arguments`.

    Args:
        rho: radius of the perturbation, finite, >= 0; 0 is the base optimizer. Default 0.05.
        perturb: which weights to perturb: a sampler. Default Bernoulli(0.6), the paper's.
        select: which samples the second gradient uses: a selector. Default TopIncrease(0.5), the
            paper's.
        ascend: the ascent direction. Default Batch(), the paper's.
        adaptive: scale the perturbation by the weights (ASAM). Default False.
        norm: one of "masked" (default), "estimated", "full", "none": see `perturbation.Norm`.
        norm_eps: added to the gradient's norm, finite, > 0. Default 1e-12.
        seed: of masks and random selections, in [0, 2**63). Default 0.
        on_nonfinite: "propagate" (default), "skip" or "raise": see `OnNonfinite`.

    Raises:
        ESAMValueError, ESAMTypeError: an argument is invalid; the message names it, the requirement
            and the value received.

    Example:
        >>> ESAMConfig.from_arguments(beta=0.5, gamma=1.0).perturb
        Bernoulli(beta=0.5, unit='tensor')
    """

    rho: float = 0.05
    perturb: samplers.Sampler = field(default_factory=samplers.Bernoulli)
    select: selectors.Selector = field(default_factory=selectors.TopIncrease)
    ascend: directions.Direction = field(default_factory=directions.Batch)
    adaptive: bool = False
    norm: Norm = "masked"
    norm_eps: float = 1e-12
    seed: int = 0
    on_nonfinite: OnNonfinite = "propagate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", validation.nonnegative("rho", self.rho))
        samplers.check_sampler("perturb", self.perturb)
        selectors.check_selector("select", self.select)
        directions.check_direction("ascend", self.ascend)
        validation.flag("adaptive", self.adaptive)
        object.__setattr__(self, "norm", validation.choice("norm", self.norm, NORMS))
        object.__setattr__(self, "norm_eps", validation.positive("norm_eps", self.norm_eps))
        seed = validation.count_number("seed", self.seed, most=2**63 - 1)
        object.__setattr__(self, "seed", seed)
        chosen = validation.choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        object.__setattr__(self, "on_nonfinite", chosen)

    @property
    def climbs_on_part(self) -> bool:
        """Whether the ascent pass uses only a part of the batch."""
        return isinstance(self.ascend, directions.Part) and self.ascend.share < 1.0

    @property
    def uses_subsets(self) -> bool:
        """Whether a pass with a graph uses only some of the samples in a batch."""
        return self.select.gamma < 1.0 or self.climbs_on_part

    def summary(self) -> str:
        """Return the main hyperparameters in one line.

        Example:
            >>> ESAMConfig.from_arguments(gamma=1.0, ascend=directions.Part(0.25)).summary()
            "rho=0.05, perturb=Bernoulli(beta=0.6, unit='tensor'), select=TopIncrease(gamma=1.0),\
 ascend=Part(share=0.25), norm='masked'"
        """
        names = ("rho", "perturb", "select", "ascend", "norm")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @classmethod
    def from_arguments(
        cls,
        *,
        beta: float | None = None,
        gamma: float | None = None,
        perturb: samplers.Sampler | None = None,
        select: selectors.Selector | None = None,
        **others: Any,
    ) -> "ESAMConfig":
        """Return a configuration from the public arguments of the optimizers.

        Args:
            beta: short for `perturb=Bernoulli(beta)`; passing both raises an error.
            gamma: short for `select=TopIncrease(gamma)`; passing both raises an error.
            perturb: a sampler, or None for Bernoulli(0.6).
            select: a selector, or None for TopIncrease(0.5).
            **others: the remaining fields of this class by name.
        """
        names = {spec.name for spec in dataclasses.fields(cls)}
        for name in others:
            if name not in names:
                known = ", ".join(sorted(names | {"beta", "gamma"}))
                raise ESAMTypeError(f"`{name}` is not a hyperparameter of ESAM. Known: {known}.")
        if beta is not None and perturb is not None:
            raise ESAMValueError(
                "`beta` is short for `perturb=Bernoulli(beta)`: pass only one of the two. "
                f"Received: beta={beta!r}, perturb={perturb!r}."
            )
        if gamma is not None and select is not None:
            raise ESAMValueError(
                "`gamma` is short for `select=TopIncrease(gamma)`: pass only one of the two. "
                f"Received: gamma={gamma!r}, select={select!r}."
            )
        if perturb is None:
            perturb = samplers.Bernoulli() if beta is None else samplers.Bernoulli(beta)
        if select is None:
            select = selectors.TopIncrease() if gamma is None else selectors.TopIncrease(gamma)
        return cls(perturb=perturb, select=select, **others)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (numbers, strings, lists) for `from_dict`.

        A custom sampler, or one that holds a function, becomes None.
        """
        data = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        data["perturb"] = component_to_dict(self.perturb)
        data["select"] = component_to_dict(self.select)
        data["ascend"] = component_to_dict(self.ascend)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ESAMConfig":
        """Return the configuration described by the output of `to_dict`.

        Args:
            data: "perturb" and "select", as `component_to_dict` writes them, and any other fields;
                those that are missing have their defaults.

        Raises:
            ESAMTypeError: `data` is not a mapping.
            ESAMValueError: the sampler could not be saved as data, "perturb" or "select" is
                missing, or a key is unknown.
        """
        arguments = _mapping("data", data)
        components = ("perturb", "select")
        known = [spec.name for spec in dataclasses.fields(cls)]
        _check_keys("data", arguments, components, known)
        for key in (*components, "ascend") if "ascend" in arguments else components:
            if arguments[key] is None:
                raise ESAMValueError(
                    f"`{key}` is a custom sampler or holds a function, and could not be saved: "
                    "pass it again in code."
                )
            arguments[key] = _component(key, arguments[key])
        return cls(**arguments)
