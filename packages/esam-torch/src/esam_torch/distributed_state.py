"""State for `torch.distributed.checkpoint`: the model, the base optimizer and ESAM's entry."""

import json
from typing import Any

import torch
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.bases import SideBySide
from esam_torch.checkpoints import read_entry
from esam_torch.groups import options_of, without_options
from esam_torch.inspection import Parameter, parameters_of
from esam_torch.optimizer import ESAM

__all__ = ["DistributedState"]

#: The key of the direction. torch raises "Missing key in checkpoint state_dict: run.direction of
#: ascend=Previous().0.weight" if the checkpoint has none, before it calls any code of ours.
_DIRECTION = "direction of ascend=Previous()"


class DistributedState:
    """A model and its ESAM as one object that `torch.distributed.checkpoint` saves and loads.

    torch's `get_optimizer_state_dict` keeps only "state" and "param_groups", and drops all other
    entries of an optimizer's state dict. This class keeps ESAM's entry, with the direction of
    `ascend=Previous()`.

    It works with FSDP2 and DistributedDataParallel. Weights and the base optimizer's state are
    saved by parameter name, as by torch's `get_state_dict`, and may be loaded with a different
    number of ranks. Hyperparameters, seed, count and the groups' `esam_...` options come from the
    checkpoint, so a resumed run draws the same masks as an uninterrupted one.

    Args:
        model: the trained model, sharded or wrapped as in the step.
        optimizer: its ESAM.
        options: torch's `StateDictOptions`. Default None: every rank saves its own shards.

    Raises:
        ESAMTypeError: `optimizer` is not an ESAM, or its base optimizer is a `SideBySide`.

    `torch.distributed.checkpoint.save({"run": DistributedState(model, optimizer)},
    checkpoint_id=folder)` calls `state_dict`, and its `load` `load_state_dict`.

    Example:
        >>> import torch
        >>> from esam_torch import ESAM, DistributedState
        >>> model, fresh = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> optimizer = ESAM(torch.optim.AdamW(model.parameters()), model, seed=7)
        >>> other = ESAM(torch.optim.AdamW(fresh.parameters()), fresh, seed=7)
        >>> saved = DistributedState(model, optimizer).state_dict()
        >>> DistributedState(fresh, other).load_state_dict(saved)
        >>> torch.equal(fresh.weight, model.weight)
        True
    """

    def __init__(self, model: nn.Module, optimizer: ESAM, *, options: Any = None) -> None:
        if not (
            isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "base_optimizer")
        ):
            raise ESAMTypeError(
                f"`optimizer` must be an ESAM. Received: {type(optimizer).__name__}."
            )
        if isinstance(optimizer.base_optimizer, SideBySide):
            raise ESAMTypeError(
                "The base optimizer must be a single one, whose state torch can name by parameter. "
                "Received: a SideBySide. Without sharded parameters, save "
                "`optimizer.state_dict()` itself."
            )
        self._model = model
        self._optimizer = optimizer
        self._options = options

    def state_dict(self) -> dict[str, Any]:
        """Return "model" and "optim" (the base optimizer's), in torch's format, and "esam".

        With `ascend=Previous()` there is also the direction, by parameter name.
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict

        base = self._optimizer.base_optimizer
        with without_options(base):
            model, optimizer = get_state_dict(self._model, base, options=self._options)
        # One string, because torch loads into the entries of the new object, and another sampler
        # has other options. So do other groups.
        own = self._optimizer.state_dict()["esam"]
        own["options"] = {
            p.unit.name: options for p in self._parameters() if (options := options_of(p.group))
        }
        kept = own.pop("direction", None)
        if kept is not None:
            self._check_options()
        state = {"model": model, "optim": optimizer}
        if kept is not None:
            # For every parameter: a new run must provide the tensors to load into, and does not
            # know yet which parameters its sampler can perturb.
            own["direction"] = list(kept)
            state[_DIRECTION] = {
                p.unit.name: kept.get(p.unit.name, torch.zeros_like(p.tensor.detach()))
                for p in self._parameters()
            }
        return {**state, "esam": json.dumps(own)}

    def _parameters(self) -> list[Parameter]:
        """Return the optimizer's parameters, with their names."""
        return parameters_of(self._model, self._optimizer.param_groups)

    def _check_options(self) -> None:
        """Raise for options that torch applies only to its own state."""
        for name in ("full_state_dict", "broadcast_from_rank0"):
            if getattr(self._options, name, False):
                raise ESAMTypeError(
                    f"With `ascend=Previous()`, `options` must not set {name}: the direction is "
                    f"always saved as it is sharded. Received: {name}=True."
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned.

        With torch's `broadcast_from_rank0`, every rank gets rank 0's "esam", like everything else.

        Raises:
            ESAMValueError: ESAM's entry is missing or does not fit. This function has not changed
                anything; torch's `load` has already written to the weights.
        """
        from torch.distributed.checkpoint import state_dict as torchs

        entry = self._entry(state_dict)  # check everything before changing anything
        options = self._options_in(entry)
        base = self._optimizer.base_optimizer
        # Load one after the other: torch's `set_state_dict` skips the model if its part is empty,
        # as it is on the ranks that receive rank 0's state.
        torchs.set_model_state_dict(self._model, state_dict.get("model", {}), options=self._options)
        with without_options(base):
            torchs.set_optimizer_state_dict(
                self._model, base, state_dict.get("optim", {}), options=self._options
            )
            loaded = base.state_dict()
        groups = [{**g, **own} for g, own in zip(loaded["param_groups"], options, strict=True)]
        self._optimizer.load_state_dict({**loaded, "param_groups": groups, "esam": entry})

    def _options_in(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the options of each of the optimizer's groups in ESAM's entry of a state.

        Raises:
            ESAMValueError: parameters that are now in one group had different options.
        """
        groups = self._optimizer.param_groups
        saved = entry.pop("options")
        found: dict[int, dict[str, Any]] = {}
        for p in self._parameters():
            options = saved.get(p.unit.name, {})
            if found.setdefault(id(p.group), options) != options:
                raise ESAMValueError(
                    "Parameters with different `esam_...` options in the checkpoint must be in "
                    f"different groups. Received: a group in which {p.unit.name} had {options}, "
                    f"and those before it {found[id(p.group)]}."
                )
        return [found.get(id(group), {}) for group in groups]

    def _entry(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return ESAM's entry of a state, on each rank, after checking that it fits."""
        own = state_dict.get("esam")
        if getattr(self._options, "broadcast_from_rank0", False):
            sent = [own]
            torch.distributed.broadcast_object_list(sent, src=0)
            own = sent[0]
        if own is None:
            raise ESAMValueError(
                "`state_dict` must have been returned by DistributedState.state_dict(). Received: "
                f"{sorted(state_dict)}, without ESAM's hyperparameters, seed and count. To load "
                "only the rest, call torch's set_state_dict(model, optimizer.base_optimizer, ...)."
            )
        entry: dict[str, Any] = json.loads(own)
        names = entry.pop("direction", [])
        if names:
            self._check_options()
            if _DIRECTION not in state_dict:
                raise ESAMValueError(
                    "The checkpoint contains a direction, so the ESAM that loads it must be "
                    f"created with the same `ascend`. Received: {self._optimizer.config.ascend!r}, "
                    "and Previous() in the checkpoint."
                )
            entry["direction"] = {name: state_dict[_DIRECTION][name] for name in names}
        read_entry(entry, self._optimizer.config, self._parameters())
        return entry
