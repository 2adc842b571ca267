"""Saving and loading the state of a training run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from esam_core import ESAMConfig, ESAMValueError, Everything, Previous
from esam_core.config import component_to_dict
from esam_torch.compat import saves_state_dict_hooks
from esam_torch.directions import Memory
from esam_torch.groups import options_of
from esam_torch.inspection import Parameter, parameters_of
from esam_torch.run import Run
from esam_torch.sharded import any_sharded
from esam_torch.spending import CHOSEN

__all__ = ["load_state", "read_entry", "state_of"]

#: The key of ESAM's entry in the groups of a sharded model's state. Where a checkpoint has none,
#: torch raises "Missing key" and this text.
_IN_GROUPS = "esam: count, seed, hyperparameters"

#: The keys of ESAM's entry, without those of a direction and of groups.
_ENTRY = {"count", "config", "budget", "spent", "blocks"}


def state_of(optimizer: torch.optim.Optimizer, run: Run) -> dict[str, Any]:
    """Return the base optimizer's state dict with ESAM's entry; run the state dict hooks."""
    hooks = saves_state_dict_hooks(optimizer)
    for before in hooks["before saving"]:
        before(optimizer)
    state = run.base.state_dict()
    state["esam"] = _entry(run)
    if isinstance(run.config.ascend, Previous):
        state["esam"]["direction"] = dict(run.memory.gradients)
    if "param_groups" in state and _sharded(run):
        state["param_groups"] = [_noted(run, group) for group in state["param_groups"]]
    for after in hooks["after saving"]:
        changed = after(optimizer, state)
        state = state if changed is None else changed
    return state


def _entry(run: Run) -> dict[str, Any]:
    """Return ESAM's entry of a state, without a direction."""
    return {
        "count": run.count,
        "config": run.config.to_dict(),
        # If the budget is spent, its sampler and selector are in the configuration.
        "budget": run.budget,
        "spent": run.spent,
        "blocks": run.measured,
    }


def load_state(optimizer: torch.optim.Optimizer, run: Run, state_dict: dict[str, Any]) -> None:
    """Load a state from `state_of` or from a bare base optimizer; run the load hooks.

    What the user should know is added to the run's notices.
    """
    hooks = saves_state_dict_hooks(optimizer)
    state = dict(state_dict)
    for before in hooks["before loading"]:
        changed = before(optimizer, state)
        state = state if changed is None else dict(changed)
    own = state.pop("esam", None)
    if "param_groups" in state:
        own, state["param_groups"] = _read_groups(run, own, state["param_groups"])
    config, count, memory = run.config, run.count, run.memory
    budget, spent, plan, measured = run.budget, run.spent, run.plan, run.measured
    options, replaced = [options_of(group) for group in run.base.param_groups], []
    if own is not None:  # check everything before changing anything
        parameters = parameters_of(run.model, run.base.param_groups)
        config, memory = read_entry(own, config, parameters)
        count, budget, spent = int(own["count"]), own["budget"], own["spent"]
        measured = own["blocks"]
        plan, replaced = None, _differences(run, config, budget, spent=spent)
    run.base.load_state_dict(state)
    if own is None:  # a bare optimizer's groups have none of ESAM's options
        for group, kept in zip(run.base.param_groups, options, strict=True):
            group.update({**kept, **options_of(group)})
    run.resume(config, count, budget, plan, memory, spent=spent, measured=measured)
    for after in hooks["after loading"]:
        after(optimizer)
    if replaced:
        options_too = _OPTIONS_TOO if _sharded(run) else ""
        run.notices.add("replaced", _REPLACED.format("; ".join(replaced)) + options_too)


_REPLACED = (
    "The checkpoint was written with other settings, which replace those given in code: {}. To "
    "continue with the checkpoint's, write them in the code too. To keep those in code, load the "
    "checkpoint into the base optimizer: optimizer.base_optimizer.load_state_dict(...). For rho, "
    "it is enough to set `esam_rho` in the parameter groups afterwards."
)

_OPTIONS_TOO = (
    " The model is sharded, so this does not load the groups' `esam_...` options: set them again."
)


def _differences(run: Run, config: ESAMConfig, budget: float | None, *, spent: bool) -> list[str]:
    """Return, in words, the settings of a run that a checkpoint's would replace."""
    names = [spec.name for spec in dataclasses.fields(config)]
    pairs = {name: (getattr(config, name), getattr(run.config, name)) for name in names}
    if run.budget is not None:
        pairs = {n: pair for n, pair in pairs.items() if n not in CHOSEN}
    if run.budget is not None or not spent:  # else, what the budget has chosen is compared
        pairs["budget"] = budget, run.budget
    return [
        f"{name}={saved!r} (in code {given!r})"
        for name, (saved, given) in pairs.items()
        if saved != given
    ]


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
    if not isinstance(own, Mapping) or not own.keys() >= _ENTRY:
        raise ESAMValueError(
            'The entry "esam" of the state must be one that `ESAM.state_dict()` has written. '
            f"Received: {own!r}."
        )
    memory = Memory()
    memory.load(own.get("direction", {}), parameters)
    return _load(own["config"], given), memory


def _sharded(run: Run) -> bool:
    """Return whether parameters are sharded over ranks."""
    return any_sharded(p for group in run.base.param_groups for p in group["params"])


def _noted(run: Run, group: dict[str, Any]) -> dict[str, Any]:
    """Return a group of a state with ESAM's entry and the group's options, as one text.

    torch's `get_optimizer_state_dict`, which trainers call for a sharded model, keeps only "state"
    and "param_groups"; it loads only options that the groups of the new run have.
    """
    bare = {name: value for name, value in group.items() if not name.startswith("esam_")}
    return {**bare, _IN_GROUPS: json.dumps({**_entry(run), "options": options_of(group)})}


def _read_groups(
    run: Run, own: dict[str, Any] | None, groups: list[dict[str, Any]]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return ESAM's entry of a state, and its groups as they were before `_noted`.

    Args:
        run: the run that loads the state.
        own: the entry, or None if the state does not have it outside its groups.
        groups: the groups of the state.
    """
    notes = [json.loads(group.get(_IN_GROUPS, "{}")) for group in groups]
    bare = [{k: v for k, v in group.items() if k != _IN_GROUPS} for group in groups]
    if own is None:
        own = {name: value for name, value in notes[0].items() if name != "options"} or None
        # torch's functions leave names in place of numbers. Others load a bare optimizer's state.
        by_torch = any(isinstance(p, str) for group in groups for p in group["params"])
        if own is None and not by_torch:
            return None, bare
        # For a whole state, torch replaces what is missing in it by what this run has saved.
        if own is None or (by_torch and run.count == 0 and own == _entry(run)):
            run.notices.add("missing", _MISSING.format(run.count, run.config))
            return None, bare
        if isinstance(_load(own["config"], run.config).ascend, Previous):
            run.notices.add("direction", _NO_DIRECTION)
    options = [note.get("options", {}) for note in notes]
    return own, [{**group, **kept} for group, kept in zip(bare, options, strict=True)]


_MISSING = (
    "The checkpoint does not contain ESAM's count, seed and hyperparameters, or was saved before "
    "the first step. The current ones are kept: count={}, {}. If the model is not sharded, torch's "
    "get_optimizer_state_dict drops them, as always with flatten_optimizer_state_dict=True: "
    "save DistributedState, or optimizer.state_dict()."
)

_NO_DIRECTION = (
    "The checkpoint does not contain the direction of `ascend=Previous()`, so the next step is a "
    "base step. Save with DistributedState to keep it."
)


def _load(saved: dict[str, Any], given: ESAMConfig) -> ESAMConfig:
    """Return a saved configuration; a sampler that could not be saved is taken from `given`."""
    if saved["perturb"] is not None:
        return ESAMConfig.from_dict(saved)
    stand_in = {**saved, "perturb": component_to_dict(Everything())}
    return dataclasses.replace(ESAMConfig.from_dict(stand_in), perturb=given.perturb)
