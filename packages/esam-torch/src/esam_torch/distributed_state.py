"""What `torch.distributed.checkpoint` saves: model, base optimizer, and ESAM's own entry."""

import json
from typing import Any

import torch
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.inspection import parameters_of
from esam_torch.optimizer import ESAM

__all__ = ["DistributedState"]


class DistributedState:
    """A model and its ESAM as one object that `torch.distributed.checkpoint` saves and loads.

    torch's `get_optimizer_state_dict` keeps "state" and "param_groups" alone and drops every other
    entry of an optimizer's state dict, ESAM's among them; this keeps it.

    For models under FSDP2 and DistributedDataParallel alike: weights and the base optimizer's state
    are saved by parameter names, as torch's `get_state_dict` has them, and may be loaded by another
    number of ranks. Hyperparameters, seed and count come from the checkpoint, so a resumed run
    draws the masks that the uninterrupted one would have drawn.

    Args:
        model: what is trained, sharded or wrapped as it is in the step.
        optimizer: its ESAM.
        options: torch's `StateDictOptions`. Default None: every rank saves its own shards.

    Raises:
        ESAMTypeError: `optimizer` is not an ESAM.

    `torch.distributed.checkpoint.save({"run": DistributedState(model, optimizer)},
    checkpoint_id=folder)` calls `state_dict`, and its `load` `load_state_dict`.

    Example:
        >>> import torch
        >>> from esam_torch import ESAM, DistributedState
        >>> model, fresh = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> optimizer = ESAM(torch.optim.AdamW(model.parameters()), model, seed=7)
        >>> other = ESAM(torch.optim.AdamW(fresh.parameters()), fresh)
        >>> saved = DistributedState(model, optimizer).state_dict()
        >>> DistributedState(fresh, other).load_state_dict(saved)
        >>> other.config.seed, torch.equal(fresh.weight, model.weight)
        (7, True)
    """

    def __init__(self, model: nn.Module, optimizer: ESAM, *, options: Any = None) -> None:
        if not (
            isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "base_optimizer")
        ):
            raise ESAMTypeError(
                f"`optimizer` must be an ESAM. Received: {type(optimizer).__name__}."
            )
        self._model = model
        self._optimizer = optimizer
        self._options = options

    def state_dict(self) -> dict[str, Any]:
        """Return "model", "optim" (the base optimizer's), both as torch has them, and "esam".

        With `ascend=Previous()` also "direction", by the parameters' names.
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(
            self._model, self._optimizer.base_optimizer, options=self._options
        )
        # One string, for torch loads into the entries that it finds in the fresh objects: another
        # sampler has other options.
        own = self._optimizer.state_dict()["esam"]
        kept = own.pop("direction", None)
        if kept is not None:
            self._check_options()
        state = {"model": model, "optim": optimizer}
        if kept is not None:
            # Of every parameter: a fresh run has to offer a place to load into, and does not know
            # yet which of them its sampler can perturb.
            own["direction"] = list(kept)
            state["direction"] = {
                name: kept.get(name, torch.zeros_like(p.detach()))
                for name, p in self._named_parameters()
            }
        return {**state, "esam": json.dumps(own)}

    def _named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Return the optimizer's parameters with their names."""
        found = parameters_of(self._model, self._optimizer.param_groups)
        return [(p.unit.name, p.tensor) for p in found]

    def _check_options(self) -> None:
        """Refuse options that torch has for the states that it knows alone."""
        for name in ("full_state_dict", "broadcast_from_rank0"):
            if getattr(self._options, name, False):
                raise ESAMTypeError(
                    f"With `ascend=Previous()`, `options` must be without {name}: the direction is "
                    f"saved as it is sharded. Received: {name}=True."
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        With torch's `broadcast_from_rank0`, "esam" is rank 0's on every rank, as all the rest is.
        """
        from torch.distributed.checkpoint import state_dict as torchs

        own = state_dict.get("esam")
        if getattr(self._options, "broadcast_from_rank0", False):
            sent = [own]
            torch.distributed.broadcast_object_list(sent, src=0)
            own = sent[0]
        base = self._optimizer.base_optimizer
        # One after the other: torch's `set_state_dict` leaves the model out where its part is
        # empty, as it is on the ranks that are sent rank 0's.
        torchs.set_model_state_dict(self._model, state_dict.get("model", {}), options=self._options)
        torchs.set_optimizer_state_dict(
            self._model, base, state_dict.get("optim", {}), options=self._options
        )
        loaded = base.state_dict()
        if own is not None:
            loaded["esam"] = entry = json.loads(own)
            names = entry.pop("direction", [])
            if names and "direction" not in state_dict:
                raise ESAMValueError(
                    "The checkpoint holds a direction, and the ESAM to load it into must be made "
                    "with the same `ascend`. Received: "
                    f"{self._optimizer.config.ascend!r}, and Previous() in the checkpoint."
                )
            entry["direction"] = {name: state_dict["direction"][name] for name in names}
        self._optimizer.load_state_dict(loaded)
