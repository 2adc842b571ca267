"""Saving and loading the state of a training run."""

import dataclasses
import warnings
from typing import Any

import torch

from esam_core import ESAMConfig, Everything, Previous
from esam_core.config import component_to_dict
from esam_torch.compat import saves_state_dict_hooks
from esam_torch.directions import Memory
from esam_torch.inspection import parameters_of
from esam_torch.run import Run

__all__ = ["load_state", "state_of"]


def state_of(optimizer: torch.optim.Optimizer, run: Run) -> dict[str, Any]:
    """Return the base optimizer's state dict with ESAM's entry; run the state dict hooks."""
    hooks = saves_state_dict_hooks(optimizer)
    for before in hooks["before saving"]:
        before(optimizer)
    state = run.base.state_dict()
    state["esam"] = {
        "count": run.count,
        "config": run.config.to_dict(),
        # If the budget is spent, its sampler and selector are in the configuration.
        "budget": run.budget,
        "spent": run.spent,
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
    config, count, memory = run.config, run.count, run.memory
    budget, spent, plan = run.budget, run.spent, run.plan
    options, replaced = [_options_of(group) for group in run.base.param_groups], []
    if own is not None:  # check everything before changing anything
        config, count = _load(own["config"], config), int(own["count"])
        budget, spent, plan = own.get("budget"), own.get("spent", False), None
        replaced = _differences(run, config, budget, spent=spent)
        memory = Memory()
        memory.load(own.get("direction", {}), parameters_of(run.model, run.base.param_groups))
    run.base.load_state_dict(state)
    if own is None:  # a bare optimizer's groups have none of ESAM's options
        for group, kept in zip(run.base.param_groups, options, strict=True):
            group.update({**kept, **_options_of(group)})
    run.resume(config, count, budget, plan, memory, spent=spent)
    for after in hooks["after loading"]:
        after(optimizer)
    if replaced and "replaced" not in run.notices:
        run.notices.add("replaced", None)
        warnings.warn(_REPLACED.format("; ".join(replaced)), stacklevel=3)


_REPLACED = (
    "The checkpoint was written with other settings, which replace those given in code: {}. To "
    "continue with the checkpoint's, write them in the code too. To keep those in code, load the "
    "checkpoint into the base optimizer: optimizer.base_optimizer.load_state_dict(...)."
)


def _differences(run: Run, config: ESAMConfig, budget: float | None, *, spent: bool) -> list[str]:
    """Return, in words, the settings of a run that a checkpoint's would replace."""
    names = [spec.name for spec in dataclasses.fields(config)]
    pairs = {name: (getattr(config, name), getattr(run.config, name)) for name in names}
    if run.budget is not None:  # the budget chooses these two
        pairs = {n: pair for n, pair in pairs.items() if n not in ("perturb", "select")}
    if run.budget is not None or not spent:  # else, what the budget has chosen is compared
        pairs["budget"] = budget, run.budget
    return [
        f"{name}={saved!r} (in code {given!r})"
        for name, (saved, given) in pairs.items()
        if saved != given
    ]


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return ESAM's options of a parameter group."""
    return {key: value for key, value in group.items() if key.startswith("esam_")}


def _load(saved: dict[str, Any], given: ESAMConfig) -> ESAMConfig:
    """Return a saved configuration; a sampler that could not be saved is taken from `given`."""
    if saved["perturb"] is not None:
        return ESAMConfig.from_dict(saved)
    stand_in = {**saved, "perturb": component_to_dict(Everything())}
    return dataclasses.replace(ESAMConfig.from_dict(stand_in), perturb=given.perturb)
