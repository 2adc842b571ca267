"""Saving and loading the state of a training run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from esam_core import ESAMConfig, Everything, Previous
from esam_core.config import component_to_dict
from esam_torch.compat import saves_state_dict_hooks
from esam_torch.directions import Memory
from esam_torch.groups import options_of
from esam_torch.inspection import Parameter, parameters_of
from esam_torch.run import Run

__all__ = ["load_state", "read_entry", "state_of"]


def state_of(optimizer: torch.optim.Optimizer, run: Run) -> dict[str, Any]:
    """Return the base optimizer's state dict with ESAM's entry; run the state dict hooks."""
    hooks = saves_state_dict_hooks(optimizer)
    for before in hooks["before saving"]:
        before(optimizer)
    state = run.base.state_dict()
    state["esam"] = {
        "count": run.count,
        "config": run.config.to_dict(),
        # A budget that was applied is in the configuration, as its sampler and selector.
        "budget": run.budget if run.plan is None else None,
    }
    if isinstance(run.config.ascend, Previous):
        state["esam"]["direction"] = dict(run.memory.gradients)
    for after in hooks["after saving"]:
        changed = after(optimizer, state)
        state = state if changed is None else changed
    return state


def load_state(optimizer: torch.optim.Optimizer, run: Run, state_dict: dict[str, Any]) -> None:
    """Load a state from `state_of` or from a bare base optimizer; run the load hooks."""
    hooks = saves_state_dict_hooks(optimizer)
    state = dict(state_dict)
    for before in hooks["before loading"]:
        changed = before(optimizer, state)
        state = state if changed is None else dict(changed)
    own = state.pop("esam", None)
    config, count, budget, plan = run.config, run.count, run.budget, run.plan
    memory, options = run.memory, [options_of(group) for group in run.base.param_groups]
    if own is not None:  # check everything before changing anything
        parameters = parameters_of(run.model, run.base.param_groups)
        config, memory = read_entry(own, config, parameters)
        count, budget, plan = int(own["count"]), own.get("budget"), None
    run.base.load_state_dict(state)
    if own is None:  # a bare optimizer's groups have none of ESAM's options
        for group, kept in zip(run.base.param_groups, options, strict=True):
            group.update({**kept, **options_of(group)})
    run.resume(config, count, budget, plan, memory)
    for after in hooks["after loading"]:
        after(optimizer)


def read_entry(
    own: Mapping[str, Any], given: ESAMConfig, parameters: Sequence[Parameter]
) -> tuple[ESAMConfig, Memory]:
    """Return the hyperparameters and the direction in ESAM's entry of a state.

    Args:
        own: the entry.
        given: the current hyperparameters.
        parameters: the parameters that are to be trained.

    Raises:
        ESAMValueError: the entry is invalid, or belongs to another model.
    """
    memory = Memory()
    memory.load(own.get("direction", {}), parameters)
    return _load(own["config"], given), memory


def _load(saved: dict[str, Any], given: ESAMConfig) -> ESAMConfig:
    """Return a saved configuration; a sampler that could not be saved is taken from `given`."""
    if saved["perturb"] is not None:
        return ESAMConfig.from_dict(saved)
    stand_in = {**saved, "perturb": component_to_dict(Everything())}
    return dataclasses.replace(ESAMConfig.from_dict(stand_in), perturb=given.perturb)
