"""The layout of a model: its parameters, blocks, costs and buffers, found once and kept."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from esam_core import ESAMConfig, ESAMTypeError, ESAMValueError, Mask, Sampler, Unit
from esam_core.reach import reach_warning
from esam_core.units import names_a_norm
from esam_torch.ascent import graph_leaves
from esam_torch.attributes import Attributes
from esam_torch.blocks import Blocks, find_blocks
from esam_torch.compat import original_name, registered_parameters
from esam_torch.devices import devices_of
from esam_torch.forwards import Forward
from esam_torch.guards import RandomState
from esam_torch.measured import blocks_from, blocks_to_data
from esam_torch.notes import ACCUMULATES, ASKS, KEPT, WITHOUT_A_GRAPH, note_errors
from esam_torch.registrations import registered_modules
from esam_torch.sharded import Shards, mesh_groups, reshard
from esam_torch.synchronisation import without_reduction
from esam_torch.targets import Options, Targets, find_targets
from esam_torch.wrappers import bare_model
from esam_torch.written import Writes

__all__ = [
    "Layout",
    "Parameter",
    "find_leaves",
    "lay_out",
    "parameters_of",
    "strange_leaves",
    "without_side_effects",
]


@dataclass(frozen=True)
class Parameter:
    """A parameter with its unit and its parameter group."""

    tensor: Tensor
    unit: Unit
    group: dict[str, Any]


@dataclass(eq=False)
class Layout:
    """The layout of a model.

    Args:
        groups: the parameter groups, each with its parameters at that time.
        parameters: all parameters in the model's order.
        blocks: the model's blocks, or None if they are not used.
        measured: the blocks as data for a checkpoint, or None.
        others: parameters of the model that are not in the optimizer.
        writes: tracks what its forwards write.
        attributes: tracks what the user changes between the passes of a step.
        devices: the devices that the model runs on.
        shards: the modules that FSDP2 shards, or None if nothing is sharded.
        modules: all modules of the model.

    Attributes:
        tensors: the parameters' tensors.
        units: their units.
        ids: the ids of all parameters of the model.
    """

    groups: Sequence[tuple[dict[str, Any], tuple[Any, ...]]]
    parameters: Sequence[Parameter]
    blocks: Blocks | None
    measured: dict[str, Any] | None
    others: Sequence[Tensor]
    writes: Writes
    attributes: Attributes
    devices: Sequence[torch.device]
    shards: Shards | None
    modules: Sequence[nn.Module]
    tensors: Sequence[Tensor] = field(init=False)
    units: Sequence[Unit] = field(init=False)
    ids: frozenset[int] = field(init=False)
    device: torch.device | None = field(init=False)
    _targets: dict[Any, Targets] = field(default_factory=dict, init=False, repr=False)
    _registered: int = field(default_factory=registered_modules, init=False, repr=False)
    _places: Sequence[tuple[dict[str, Any], str, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tensors = [p.tensor for p in self.parameters]
        self.units = tuple(p.unit for p in self.parameters)
        self.ids = frozenset(map(id, self.everything))
        self.device = self.tensors[0].device if self.tensors else None
        # FSDP2 replaces the parameters of a sharded model in each forward.
        self._places = () if self.shards is not None else registered_parameters(self.modules)

    def why_all_gradients(self) -> str | None:
        """Return why the ascent pass must compute the gradients of all weights; None if not."""
        if self.writes.keeps_graphs:
            return KEPT
        if self.writes.accumulates:
            return ACCUMULATES
        # A sharded model itself asks, and computes all gradients anyway.
        asks = self.blocks is not None and self.blocks.asks and self.shards is None
        return ASKS if asks else None

    def holds(self, model: nn.Module, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether modules, groups and parameters are still the same, on the same device."""
        if self._registered != registered_modules():
            if list(model.modules()) != self.modules:
                return False
            self._registered = registered_modules()
        for registered, name, old in self._places:
            if registered.get(name) is not old:
                return False  # as after load_state_dict(..., assign=True)
        if self.tensors and self.tensors[0].device != self.device:  # a model moves as a whole
            return False
        return len(groups) == len(self.groups) and all(
            group is then
            and len(group["params"]) == len(old)
            and all(map(operator.is_, group["params"], old))
            for group, (then, old) in zip(groups, self.groups, strict=True)
        )

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """The names of the optimizer's parameters, by id."""
        return {id(p.tensor): p.unit.name for p in self.parameters}

    @property
    def everything(self) -> Sequence[Tensor]:
        """All parameters, in the optimizer or not."""
        return (*self.tensors, *self.others)

    def trained(self) -> list[Tensor]:
        """Return all parameters that have a gradient now, in the optimizer or not."""
        return [p for p in self.everything if p.requires_grad]

    @functools.cached_property
    def groups_sharing_a_batch(self) -> list[Any]:
        """The process groups over which layers are split (tensor parallelism), not the batch."""
        groups = dict.fromkeys(g for tensor in self.everything for g in mesh_groups(tensor))
        if not groups or self.shards is None:
            return list(groups)
        # Equal meshes may have other groups of the same ranks.
        ranks = torch.distributed.get_process_group_ranks
        of_batches = [ranks(group) for group in self.shards.groups()]
        return [group for group in groups if ranks(group) not in of_batches]

    def reach_warning(self, config: ESAMConfig) -> str | None:
        """Return a warning if the sampler reaches no or few weights; None if rho is 0."""
        defaults = Options.of(config)
        rows = [(defaults.of_group(p.group), p.tensor.requires_grad) for p in self.parameters]
        if all(o.rho == 0.0 for o, _ in rows):
            return None
        may = [trained and o.perturbs for o, trained in rows]
        return reach_warning(config.perturb, self.units, may)

    def targets(self, mask: Mask, defaults: Options) -> Targets:
        """Return the targets of a mask under the current options of the groups."""
        trained = tuple([t.dtype if t.requires_grad else None for t in self.tensors])
        options = [defaults.of_group(group) for group, _ in self.groups]
        key = (mask, trained, defaults, *options)
        found = self._targets.get(key)
        if found is None:
            of_group = {id(group): o for (group, _), o in zip(self.groups, options, strict=True)}
            found = find_targets(
                self.tensors,
                self.units,
                mask,
                [of_group[id(p.group)] for p in self.parameters],
            )
            while len(self._targets) >= _KEPT:
                del self._targets[next(iter(self._targets))]
            self._targets[key] = found
        return found


#: For how many masks a layout caches the targets.
_KEPT = 8


def _kind(owner: nn.Module, leaf: str) -> str:
    """Return the kind of the parameter `leaf` of module `owner`."""
    if names_a_norm(type(owner).__name__):
        return "norm"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    return "bias" if "bias" in leaf else "weight"


def parameters_of(
    model: nn.Module, groups: list[dict[str, Any]], blocks: Blocks | None = None
) -> list[Parameter]:
    """Return the optimizer's parameters, in the model's order, with names and kinds.

    The order is the model's, not that of the groups, so that a mask does not depend on how the
    user sorts parameters into groups.

    Args:
        model: the trained model; wrappers are unwrapped.
        groups: the base optimizer's parameter groups.
        blocks: the model's blocks, if they have been found.

    Raises:
        ESAMValueError: the optimizer has a parameter that does not belong to the model, or one that
            does not exist yet.
        ESAMTypeError: `model` is not a module, or its parameters collect per-sample gradients.
    """
    if not isinstance(model, nn.Module):
        raise ESAMTypeError(
            "`model` must be a torch.nn.Module. Put trained tensors without a module into "
            f"torch.nn.ParameterList([...]). Received: {type(model).__name__}."
        )
    group_of = {id(p): group for group in groups for p in group["params"]}
    found: list[Parameter] = []
    inner = bare_model(model)
    reshard(inner)  # the tensors that a forward of a sharded model gathers are not its parameters
    for prefix, module in inner.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            group = group_of.pop(id(tensor), None)  # a tied parameter counts at its first place
            if group is not None:
                name = original_name(f"{prefix}.{leaf}" if prefix else leaf)
                _check_trainable(name, tensor)
                place = 0 if blocks is None else blocks.block_of[id(tensor)]
                unit = Unit(
                    name,
                    tuple(tensor.shape),
                    _kind(module, leaf),
                    block="" if blocks is None else blocks.names[place],
                    cost=0.0 if blocks is None else blocks.cost_of[id(tensor)],
                    depth=place,
                    trained=tensor.requires_grad,
                )
                found.append(Parameter(tensor, unit, group))
    if group_of:
        strangers = [p for group in groups for p in group["params"] if id(p) in group_of]
        shapes = ", ".join(str(tuple(p.shape)) for p in strangers[:3])
        raise ESAMValueError(
            "The base optimizer must contain only parameters of `model`. Received: "
            f"{len(strangers)} not in the model, of shapes {shapes}. If the loss has parameters of "
            "its own (a temperature, a margin), pass ESAM a container of both: "
            "torch.nn.ModuleList([model, loss]). If the parameters were replaced after the "
            "optimizer was created, by `.to(...)` or a wrapper, create the optimizer again."
        )
    return found


def _check_trainable(name: str, parameter: Tensor) -> None:
    """Raise if a step cannot train a parameter."""
    if isinstance(parameter, UninitializedParameter):
        raise ESAMValueError(
            "All weights of `model` must exist: call it once on a batch before ESAM is created. "
            f"Received: {name} of a lazy module that has not been called."
        )
    if hasattr(parameter, "grad_sample"):  # set by Opacus's GradSampleModule
        raise ESAMTypeError(
            "`model` must not collect per-sample gradients, as Opacus's GradSampleModule does: "
            "those of all passes of a step, at theta and at theta + epsilon, would be used "
            "together. Differentially private training is not supported. Received: "
            f"{name} with `grad_sample`."
        )


@contextlib.contextmanager
def without_side_effects(
    model: nn.Module,
    devices: Sequence[torch.device],
    writes: Writes,
) -> Iterator[None]:
    """Make a forward inside the context free of side effects and without a graph."""
    random = RandomState(devices)
    before = Forward(writes)
    try:
        with (
            without_reduction(model),
            note_errors(WITHOUT_A_GRAPH, RuntimeError, "does not require grad"),
        ):
            yield
        before.note()
    finally:
        before.undo()
        random.restore()


def find_leaves(forward: Callable[[], Tensor], model: nn.Module, layout: Layout) -> set[int]:
    """Return the ids of the leaves that a forward's result depends on, without side effects."""
    with without_side_effects(model, layout.devices, layout.writes):
        return {id(leaf) for leaf in graph_leaves(forward())}


def strange_leaves(mean: Tensor, leaves: list[Tensor], layout: Layout) -> list[Tensor]:
    """Return the leaves of the loss that belong to neither the model nor the batch."""
    known = layout.ids.union(map(id, leaves)) if leaves else layout.ids
    if layout.shards is not None:
        known = known.union(map(id, layout.shards.gathered()))
    return [leaf for leaf in graph_leaves(mean) if id(leaf) not in known]


def lay_out(
    model: nn.Module,
    groups: list[dict[str, Any]],
    sampler: Sampler,
    forward: Callable[[], Any],
    *,
    chosen: Sequence[nn.Module | str] | None,
    watch: bool,
    measured: dict[str, Any] | None = None,
) -> Layout:
    """Return the layout of a model, with blocks and costs if they are needed.

    Args:
        model: the trained model.
        groups: the base optimizer's parameter groups.
        sampler: the sampler of the masks.
        forward: runs the model once on a batch; called only to find the blocks.
        chosen: the user's blocks, or None.
        watch: find the blocks even if the sampler does not need them.
        measured: blocks that have been measured before; see `esam_torch.measured`.
    """
    parameters = parameters_of(model, groups)
    known = {id(p.tensor) for p in parameters}
    devices = devices_of(model)
    shards = Shards.of(model)
    writes = Writes(model, [p.tensor for p in parameters], weights=shards is None)
    blocks = kept = None
    if watch or chosen is not None or sampler.needs_blocks:
        trained = {id(p.tensor) for p in parameters if p.tensor.requires_grad}
        blocks = blocks_from(measured, model, trained, chosen)
        if blocks is None:
            with without_side_effects(model, devices, writes):
                blocks = find_blocks(model, forward, trained, chosen)
        parameters = parameters_of(model, groups, blocks)
        kept = blocks_to_data(model, blocks, trained)
    return Layout(
        groups=[(group, tuple(group["params"])) for group in groups],
        parameters=parameters,
        blocks=blocks,
        measured=kept,
        others=[p for p in model.parameters() if id(p) not in known],
        writes=writes,
        attributes=Attributes(model, writes),
        devices=devices,
        shards=shards,
        modules=list(model.modules()),
    )
