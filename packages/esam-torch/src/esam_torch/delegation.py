"""The part of ESAM that is its base optimizer's or its run's: groups, state, modes, checkpoints."""

from typing import Any

import torch
from torch import nn

from esam_core import ESAMConfig, ESAMValueError, StepReport
from esam_torch.checkpoints import load_state, state_of
from esam_torch.groups import check_groups
from esam_torch.inspection import parameters_of
from esam_torch.run import Run

__all__ = ["DelegatingOptimizer"]


class DelegatingOptimizer(torch.optim.Optimizer):
    """An optimizer whose parameter groups and state are those of a run's base optimizer."""

    _run: Run

    def __init__(self, run: Run) -> None:
        self._run = run
        # torch's way to make an optimizer without parameter groups of its own: the groups and the
        # state are the base's (see the properties), hooks and the profiler's wrapper are ours.
        self.__setstate__({"defaults": dict(run.base.defaults)})

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that makes the update."""
        return self._run.base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups: the very list."""
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
        """Add a group to the base optimizer; its parameters must be the model's."""
        check_groups([param_group])
        self._run.base.add_param_group(param_group)
        try:
            parameters_of(self._run.model, self._run.base.param_groups)
        except ESAMValueError:
            self._run.base.param_groups.pop()
            raise

    def train(self) -> None:
        """Call the base optimizer's `train()` where it has one (schedule-free optimizers)."""
        if hasattr(self._run.base, "train"):
            self._run.base.train()

    def eval(self) -> None:
        """Call the base optimizer's `eval()` where it has one (schedule-free optimizers)."""
        if hasattr(self._run.base, "eval"):
            self._run.base.eval()

    # -- the run's --------------------------------------------------------------------------------

    @property
    def report(self) -> StepReport | None:
        """What the last step saw; None before the first."""
        return self._run.report

    @property
    def config(self) -> ESAMConfig:
        """The hyperparameters."""
        return self._run.config

    @property
    def count(self) -> int:
        """How many ascents there have been: what masks and schedules are drawn from."""
        return self._run.count

    @property
    def model(self) -> nn.Module:
        """The model that `losses` calls. May be set to what wraps it (DistributedDataParallel)."""
        return self._run.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        if model is not self._run.model:
            self._run.set_model(model)

    # -- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict and one more entry, "esam".

        It loads into the bare base optimizer too. Hooks registered on either optimizer run; torch
        does not keep the entry in a `torch.distributed.checkpoint`: see `DistributedState`.
        """
        return state_of(self, self._run)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or a bare base optimizer's.

        Hyperparameters, seed and count come from the checkpoint, as the learning rate does. A
        sampler that holds a function cannot be saved, and stays the one given in code.
        """
        load_state(self, self._run, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy, which copies the model and the base optimizer along with this one. A
        # scheduler's wrapper around `step` belongs to the original.
        state = self.__dict__.copy()
        state.pop("step", None)
        return state
