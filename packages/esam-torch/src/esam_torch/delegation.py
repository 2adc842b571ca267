"""The part of ESAM that delegates to its base optimizer and its run."""

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esam_core import ESAMConfig, ESAMError, StepReport
from esam_torch.checkpoints import load_state, state_of
from esam_torch.groups import check_groups
from esam_torch.inspection import parameters_of
from esam_torch.run import Run

__all__ = ["DelegatingOptimizer"]


#: The names of hyperparameters. Steps read them from `config` or from the run, so setting such an
#: attribute would have no effect.
HYPERPARAMETERS = frozenset(
    {"beta", "gamma", "blocks", "take", *(spec.name for spec in dataclasses.fields(ESAMConfig))}
)


class DelegatingOptimizer(torch.optim.Optimizer):
    """An optimizer whose parameter groups and state are those of a run's base optimizer."""

    _run: Run

    def __init__(self, run: Run) -> None:
        self._run = run
        # torch's way to create an optimizer without its own parameter groups. The groups and the
        # state are the base optimizer's (see the properties); hooks and the profiler's wrapper are
        # ours.
        self.__setstate__({"defaults": dict(run.base.defaults)})

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise for a hyperparameter: steps would not read the attribute."""
        if name in HYPERPARAMETERS:
            way_out = (
                "set `esam_rho` in each of `optimizer.param_groups`"
                if name == "rho"
                else "create ESAM again around the same base optimizer"
            )
            raise AttributeError(
                f"`{name}` cannot be set, because steps would not read the attribute: {way_out}. "
                f"Received: {name}={value!r}."
            )
        super().__setattr__(name, value)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The base optimizer."""
        return self._run.base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups: the same list object."""
        return self._run.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._run.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self._run.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self._run.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its parameters must belong to the model."""
        check_groups([param_group], self.defaults)
        self._run.base.add_param_group(param_group)
        try:
            parameters_of(self._run.model, self._run.base.param_groups)
        except ESAMError:
            self._run.base.param_groups.pop()
            raise

    def train(self) -> None:
        """Call the base optimizer's `train()` if it has one (schedule-free optimizers)."""
        if hasattr(self._run.base, "train"):
            self._run.base.train()

    def eval(self) -> None:
        """Call the base optimizer's `eval()` if it has one (schedule-free optimizers)."""
        if hasattr(self._run.base, "eval"):
            self._run.base.eval()

    # -- the run's --------------------------------------------------------------------------------

    @property
    def report(self) -> StepReport | None:
        """The report of the last step; None before the first."""
        return self._run.report

    @property
    def config(self) -> ESAMConfig:
        """The hyperparameters."""
        return self._run.config

    @property
    def budget(self) -> float | None:
        """The budget, which chooses the hyperparameters `perturb` and `select`; None without."""
        return self._run.budget

    @property
    def count(self) -> int:
        """The number of steps so far, from which masks and schedules are drawn."""
        return self._run.count

    @property
    def model(self) -> nn.Module:
        """The model that `losses` calls. May be set to a wrapper (DistributedDataParallel)."""
        return self._run.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        if model is not self._run.model:
            self._run.set_model(model)

    if not TYPE_CHECKING:  # a type checker must still find attributes that do not exist

        def __getattr__(self, name: str) -> Any:
            """Raise for a missing attribute, with a hint for the methods of other SAMs."""
            hint = ""
            if name in HYPERPARAMETERS:
                hint = ": the hyperparameters are in `optimizer.config`"
            if name in ("first_step", "second_step"):
                hint = (
                    ": one backward runs both passes. Write `loss = optimizer.loss(losses, inputs, "
                    "targets)`, `loss.backward()` and `optimizer.step()`, where `losses` returns "
                    "one loss per sample"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}.")

    # -- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict with an additional entry, "esam".

        It also loads into the bare base optimizer. Hooks registered on either optimizer run.
        torch's `get_optimizer_state_dict` drops the entry; for a sharded model it is also in the
        parameter groups, without a direction. `DistributedState` keeps all of it.
        """
        return state_of(self, self._run)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of an ESAM or of a bare base optimizer.

        Hyperparameters, seed and count come from the checkpoint, as does the learning rate. A
        warning lists those that differ from the ones given in code. A sampler that holds a function
        cannot be saved; the one given in code is kept. If torch's `set_optimizer_state_dict` loads
        a state without ESAM's entry, a warning says so.
        """
        load_state(self, self._run, state_dict)
        self._warn("load_state_dict")

    def _warn(self, method: str) -> None:
        """Issue the pending warnings, at the line that called this method of the optimizer."""
        for text in self._run.notices.take():
            level, function = 3, getattr(self, method)  # the caller, the method, this
            # torch wraps `step`, for its hooks and in a scheduler; each wrapper is one more frame.
            while (function := getattr(function, "__wrapped__", None)) is not None:
                level += 1
            warnings.warn(text, stacklevel=level)

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy, which also copies the model and the base optimizer. A scheduler's
        # wrapper around `step` belongs to the original.
        state = self.__dict__.copy()
        state.pop("step", None)
        return state
