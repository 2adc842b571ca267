"""Checkpoints from which training resumes exactly."""

import math
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from esam_core import ESAMValueError
from esam_torch.fitting.history import History
from esam_torch.fitting.measures import Means
from esam_torch.fitting.randomness import generators_of, load_random_state, random_state
from esam_torch.fitting.ranks import SharedOrder, world
from esam_torch.fitting.settings import check_settings, settings_of, trained
from esam_torch.wrappers import bare_model

__all__ = ["Checkpoints", "Place"]


@dataclass
class Place:
    """The position of training in the data.

    Args:
        epoch: from 1.
        updates: the number of completed updates of this epoch.
        random: state of the random generators, including the loader's, before this epoch; from this
            state the loader yields the same batches again.
        rate: the learning rate at the start of this epoch.
        data: what determines the batches of this epoch.
    """

    epoch: int = 1
    updates: int = 0
    random: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """Writes "last.pt" and "best.pt" to a folder, and reads the last one.

    Args:
        folder: the folder of the checkpoints; None for no checkpoints.
        model: the trained model; wrappers are unwrapped.
        parts: other objects with a `state_dict`, by name: optimizer, scheduler, scaler.
        loader: the training data.
        device: the model's device.
        monitor: the column whose best value determines "best.pt". Epochs without this number are
            ignored.
        smallest: whether its smallest value is the best.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: nn.Module,
        parts: Mapping[str, Any],
        loader: Any,
        device: torch.device,
        monitor: str,
        *,
        smallest: bool,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._model = bare_model(model)
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._loader = loader
        self._device = device
        self._monitor = monitor
        self._smallest = smallest
        self.history = History()
        self._settings: dict[str, str] = {}
        if self._folder is not None:
            if parts["optimizer"] not in trained:  # otherwise they are not those of the code
                self._settings = settings_of(parts["optimizer"], parts["scheduler"])
            self._folder.mkdir(parents=True, exist_ok=True)

    # -- random state -----------------------------------------------------------------------------

    def random_state(self) -> dict[str, Any]:
        """Return the state of every random generator that data and training use."""
        loaders = [generator.get_state() for generator in generators_of(self._loader)]
        order = self._order.seed if self._order is not None else None
        return {**random_state(self._device), "loader": loaders, "order": order}

    @property
    def _order(self) -> SharedOrder | None:
        """Return the order of the samples that ranks share, or None."""
        sampler = getattr(self._loader, "sampler", None)
        return sampler if isinstance(sampler, SharedOrder) else None

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of every generator."""
        load_random_state(state, self._device)
        generators = generators_of(self._loader)
        if len(generators) != len(state["loader"]):
            raise ESAMValueError(
                "`loader` must have as many generators as when the checkpoint was written. "
                f"Received: {len(generators)}, not {len(state['loader'])}."
            )
        for generator, saved in zip(generators, state["loader"], strict=True):
            generator.set_state(saved.cpu())
        if self._order is not None and state["order"] is not None:
            self._order.seed = state["order"]

    # -- files ------------------------------------------------------------------------------------

    def save(self, place: Place, means: Means) -> None:
        """Write "last.pt" and the history. All ranks call this; only rank 0 writes."""
        if self._folder is None:
            return
        mine = {"start": place.random, "now": self.random_state(), "means": means.state_dict()}
        rank, size = world()
        ranks: list[Any] = [mine]
        if size > 1:
            ranks = [None] * size
            torch.distributed.all_gather_object(ranks, mine)
        if rank == 0:
            state = {
                "model": self._model.state_dict(),
                **{name: part.state_dict() for name, part in self._parts.items()},
                "epoch": place.epoch,
                "updates": place.updates,
                "rate": place.rate,
                "data": place.data,
                "settings": self._settings,
                "history": self.history.rows,
                "ranks": ranks,
            }
            self._write(state, "last.pt")
            self.history.to_csv(self._folder / "history.csv")
            self.history.to_json(self._folder / "history.json")

    def save_after(self, epoch: int, means: Means) -> None:
        """Save the state after an epoch, and the model if it is the best so far."""
        self.save(Place(epoch + 1, 0, self.random_state()), means)
        self.save_best()

    def save_best(self) -> None:
        """Write "best.pt", with the model and its row, if the last epoch is the best so far."""
        if self._folder is None or world()[0] > 0:
            return
        rows = [row for row in self.history if not math.isnan(row.get(self._monitor, math.nan))]
        if not rows:
            return
        best = History(rows).best(self._monitor, smallest=self._smallest)
        if best is self.history.last:
            self._write({"model": self._model.state_dict(), "row": self.history.last}, "best.pt")

    def _write(self, state: Mapping[str, Any], name: str) -> None:
        """Write a file atomically: a process killed meanwhile keeps the old file."""
        if self._folder is None:
            return
        part = self._folder / (name + ".part")
        with part.open("wb") as file:
            torch.save(_plain(state), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._folder / name)

    def load(self, means: Means) -> tuple[Place, dict[str, Any]] | None:
        """Load "last.pt" if it exists.

        Returns:
            The position in the data and the random state there; None without a file.
        """
        if self._folder is None or not (self._folder / "last.pt").exists():
            return None
        state = torch.load(self._folder / "last.pt", map_location="cpu", weights_only=True)
        if "settings" not in state:
            raise ESAMValueError(
                'The checkpoint "last.pt" must be of this version of esam. Received: one of an '
                "earlier version. Use another `folder`, or resume=False, which overwrites this run."
            )
        rank, size = world()
        if len(state["ranks"]) != size:
            raise ESAMValueError(
                "Training must resume with as many processes as wrote the checkpoint, "
                f"{len(state['ranks'])}. Received: {size}."
            )
        if self._settings and state["settings"]:
            check_settings(state["settings"], self._settings)
        self._settings = state["settings"]
        missing = [name for name in self._parts if name not in state]
        if missing:
            raise ESAMValueError(
                "The checkpoint must contain the state of everything that is resumed. Missing: "
                f"{', '.join(missing)}."
            )
        self._model.load_state_dict(state["model"])
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.history.rows[:] = state["history"]
        mine = state["ranks"][rank]
        means.load_state_dict(mine["means"])
        place = Place(state["epoch"], state["updates"], mine["start"], state["rate"], state["data"])
        return place, mine["now"]


def _plain(state: Any) -> Any:
    """Return a state with Python's numbers instead of NumPy's, which torch does not load."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, list | tuple) and type(state) in (list, tuple):
        return type(state)(_plain(value) for value in state)
    if isinstance(state, Mapping):
        plain = {key: _plain(value) for key, value in state.items()}
        kind: Any = type(state)
        if kind not in (Counter, OrderedDict):  # torch loads these two as they are
            return plain
        kept = kind(plain)
        vars(kept).update(vars(state))  # a module's `_metadata`: the versions of its layers
        return kept
    return state
