"""Ascent directions: from a part of the batch, or from earlier steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esam_core import Batch as WholeBatch
from esam_core import ESAMConfig, ESAMTypeError, ESAMValueError, Momentum, Part, Previous
from esam_core.directions import check_saved_direction, climbing_indices, kept_units
from esam_torch.bases import SideBySide
from esam_torch.inspection import Layout, Parameter
from esam_torch.sharded import distributed_like, local, placed_like, shards_of
from esam_torch.targets import Options, Targets

__all__ = ["Climb", "Memory", "check_moment", "find_climb"]

#: The names that optimizers use for their first moment.
_MOMENTS = ("momentum_buffer", "exp_avg")

#: Optimizers that keep only a part of the first moments on each rank, by class name.
_OF_A_PART = ("ZeroRedundancyOptimizer", "OSS", "DistributedFusedAdam")

#: torch's optimizers without one. RMSprop's buffer has gradients that are already divided.
_WITHOUT = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "RMSprop", "Rprop")


def check_moment(base: torch.optim.Optimizer) -> None:
    """Raise if a base optimizer is known to lack first moments, which `Momentum` needs.

    Raises:
        ESAMValueError: it has none, or only some on each rank; the message names the optimizer.
    """
    for optimizer in base.optimizers if isinstance(base, SideBySide) else (base,):
        name = type(optimizer).__name__
        if any(parent.__name__ in _OF_A_PART for parent in type(optimizer).__mro__):
            raise ESAMValueError(_SOME_MOMENTS + f" Received: {name}.")
        if isinstance(optimizer, torch.optim.SGD):
            if all(group["momentum"] for group in optimizer.param_groups):
                continue
            name = "SGD with momentum=0"
        elif name not in _WITHOUT or not type(optimizer).__module__.startswith("torch.optim"):
            continue
        raise ESAMValueError(_NO_MOMENT + f" Received: {name}.")


_NO_MOMENT = (
    "`ascend=Momentum()` needs a base optimizer with a first moment, such as SGD with momentum > 0 "
    "or Adam. `ascend=Previous()` needs none."
)


_SOME_MOMENTS = (
    "`ascend=Momentum()` needs the first moments of all parameters on every rank, but this base "
    "optimizer distributes them. `ascend=Previous()` needs none."
)


@dataclass(frozen=True)
class Climb:
    """The ascent direction of one step.

    Args:
        batch_size: the number of samples, if it must be known before the first pass.
        part: (n,) indices of the samples in the ascent pass, if they are a part of the batch.
        direction: the direction from earlier steps, for the perturbed parameters and, with
            `norm="full"`, for the idle ones after them; None if this step has an ascent pass.
    """

    batch_size: int | None = None
    part: Tensor | None = None
    direction: list[Tensor] | None = None


def find_climb(
    config: ESAMConfig,
    targets: Targets,
    memory: "Memory",
    base: torch.optim.Optimizer,
    layout: Layout,
    *,
    count: int,
    size: Callable[[], int],
) -> Climb | None:
    """Return the ascent direction of a step; None if there is none, before the first update.

    Args:
        config: the hyperparameters.
        targets: the parameters that the step perturbs.
        memory: the gradient of the last update.
        base: the base optimizer.
        layout: the model's layout.
        count: the step count.
        size: returns the number of samples in the batch; called only if it is needed.
    """
    ascend = config.ascend
    if isinstance(ascend, WholeBatch) or not targets.tensors:
        return Climb()
    if isinstance(ascend, Part):
        b = size()
        drawn = climbing_indices(ascend, b, seed=config.seed, count=count)
        return Climb(b, None if len(drawn) == b else torch.from_numpy(drawn))
    of = [*targets.tensors, *(targets.idle if config.norm == "full" else ())]
    direction = memory.direction(ascend, base, layout, of, perturbed=len(targets.tensors))
    if direction is None:
        return None
    return Climb(size() if config.select.gamma < 1.0 else None, direction=direction)


class Memory:
    """The gradient of the last update: the ascent direction of `Previous`.

    Attributes:
        gradients: by parameter name, for the parameters that the sampler can perturb.
    """

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self._of: Layout | None = None
        self._key: Any = None
        self._kept: tuple[bool, ...] = ()

    def record_update(self, layout: Layout, config: ESAMConfig) -> None:
        """Keep the gradients that the base optimizer is about to use, if there are any."""
        if all(tensor.grad is None for tensor in layout.tensors):
            return
        rows = zip(layout.parameters, self._kept_of(layout, config), strict=True)
        given = {p.unit.name: (p.tensor.grad, p.tensor) for p, kept in rows if kept}
        placed = {n: placed_like(g.detach(), p) for n, (g, p) in given.items() if g is not None}
        self.gradients = _copy(placed, self.gradients)

    def _kept_of(self, layout: Layout, config: ESAMConfig) -> tuple[bool, ...]:
        """Return, for each parameter, whether its gradient is kept; computed once per layout."""
        defaults = Options.of(config)
        perturbed = {id(group): defaults.of_group(group).perturb for group, _ in layout.groups}
        allowed = tuple(
            p.tensor.requires_grad and perturbed[id(p.group)] for p in layout.parameters
        )
        if self._of is not layout or self._key != (config, allowed):
            self._of, self._key = layout, (config, allowed)
            self._kept = kept_units(config.perturb, layout.units, allowed, norm=config.norm)
        return self._kept

    def load(self, saved: Mapping[str, Tensor], parameters: Sequence[Parameter]) -> None:
        """Load a saved direction, after checking that it fits this model.

        Raises:
            ESAMValueError: it belongs to another model.
        """
        tensors = {p.unit.name: p.tensor for p in parameters}
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        check_saved_direction({name: tuple(g.shape) for name, g in saved.items()}, shapes)
        self.gradients = {
            name: distributed_like(g, tensors[name]).to(
                device=tensors[name].device, dtype=tensors[name].dtype, copy=True
            )
            for name, g in saved.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy: the layout of a model is found again for its copy.
        return {**self.__dict__, "_of": None, "_key": None, "_kept": ()}

    def direction(
        self,
        ascend: Previous | Momentum,
        base: torch.optim.Optimizer,
        layout: Layout,
        of: Sequence[Tensor],
        *,
        perturbed: int,
    ) -> list[Tensor] | None:
        """Return the ascent direction, with zeros for parameters without one.

        Args:
            ascend: its source and its sign.
            base: the base optimizer.
            layout: the model's layout.
            of: the parameters.
            perturbed: how many of them are perturbed; these come first. If none of these has a
                direction, None is returned.
        """
        if isinstance(ascend, Momentum):
            state = base.state
            found = [_moment(state.get(tensor, {}), tensor, base) for tensor in of]
        else:
            found = [
                _fitting(self.gradients.get(layout.names[id(tensor)]), tensor) for tensor in of
            ]
        if all(direction is None for direction in found[:perturbed]):
            return None
        shards = _shards(found, of)
        return list(torch._foreach_neg(shards)) if ascend.sign < 0 else shards


def _copy(gradients: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return dense copies of gradients, reusing the memory of the old ones if they fit."""
    copies: dict[str, Tensor] = {}
    places: list[Tensor] = []
    sources: list[Tensor] = []
    for name, g in gradients.items():
        place = old.get(name)
        if g.is_sparse or place is None or not _alike(place, g):
            copies[name] = g.to_dense() if g.is_sparse else g.clone()
        else:
            copies[name] = place
            places.append(local(place))
            sources.append(local(g))
    if places:
        torch._foreach_copy_(places, sources)
    return copies


def _alike(place: Tensor, g: Tensor) -> bool:
    """Return whether a gradient can be copied to the place of an earlier one."""
    return (place.shape, place.dtype, place.device) == (g.shape, g.dtype, g.device)


def _fitting(direction: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return the direction of a parameter, or None if another one had its name before."""
    return direction if direction is not None and direction.shape == parameter.shape else None


def _shards(found: Sequence[Tensor | None], of: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's parts of the parameters' directions, with zeros for those without one."""
    pairs = zip(found, of, strict=True)
    whole = [torch.zeros_like(p.detach()) if d is None else d for d, p in pairs]
    # The model may have moved since.
    return [s.to(p.device, p.dtype) for s, p in zip(shards_of(whole, of), of, strict=True)]


def _moment(state: Mapping[str, Any], parameter: Tensor, base: torch.optim.Optimizer) -> Any:
    """Return the first moment in a parameter's state, or None before its first update."""
    for name in _MOMENTS:
        if name in state:
            found = state[name]
            if found is None or (isinstance(found, Tensor) and found.shape == parameter.shape):
                return found
    if not state:
        return None
    raise ESAMTypeError(
        f"{_NO_MOMENT} Received: {type(base).__name__}, which keeps {', '.join(map(str, state))}."
    )
