"""Checkpoints from which training resumes exactly."""

import io
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.fitting.history import History
from esam_torch.fitting.measures import Means
from esam_torch.fitting.randomness import generators_of, load_random_state, random_state
from esam_torch.fitting.ranks import SharedOrder, sum_over_ranks, world
from esam_torch.fitting.settings import check_settings, settings_of, trained
from esam_torch.optimizer import ESAM
from esam_torch.wrappers import bare_model

__all__ = ["Checkpoints", "Place"]

#: The files in a run's folder.
_LAST, _BEST, _CSV, _JSON = _FILES = ("last.pt", "best.pt", "history.csv", "history.json")

_ANEW = "Use another `folder`, or resume=False, which overwrites this run."


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
        seconds: how long training has taken in this epoch.
        samples: the number of this process's samples in this epoch.
    """

    epoch: int = 1
    updates: int = 0
    random: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    samples: int = 0


class Checkpoints:
    """Writes "last.pt", "best.pt" and the history to a folder, and reads the first.

    Args:
        folder: the folder of the checkpoints; None for no checkpoints.
        model: the trained model; wrappers are unwrapped.
        parts: other objects with a `state_dict`, by name: optimizer, scheduler, scaler.
        loaders: the training data first; then the evaluation data, if there are any.
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
        loaders: Sequence[Any],
        device: torch.device,
        monitor: str,
        *,
        smallest: bool,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._model = bare_model(model)
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._loaders = loaders
        self._device = device
        self._monitor = monitor
        self._smallest = smallest
        self.history = History()
        self._settings: dict[str, str] = {}
        self._loads = False
        if self._folder is not None:
            if parts["optimizer"] not in trained:  # otherwise they are not those of the code
                self._settings = settings_of(parts["optimizer"], parts["scheduler"])
            self._folder.mkdir(parents=True, exist_ok=True)

    # -- random state -----------------------------------------------------------------------------

    def random_state(self) -> dict[str, Any]:
        """Return the state of every random generator that data and training use."""
        loaders = [generator.get_state() for generator in generators_of(self._loaders)]
        order = self._order.seed if self._order is not None else None
        return {**random_state(self._device), "loader": loaders, "order": order}

    @property
    def _order(self) -> SharedOrder | None:
        """Return the order of the samples that ranks share, or None."""
        sampler = getattr(self._loaders[0], "sampler", None)
        return sampler if isinstance(sampler, SharedOrder) else None

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of every generator."""
        load_random_state(state, self._device)
        for generator, saved in zip(generators_of(self._loaders), state["loader"], strict=True):
            generator.set_state(saved.cpu())
        if self._order is not None and state["order"] is not None:
            self._order.seed = state["order"]

    # -- files ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Set aside the files of an earlier run in this folder until this run has saved its own.

        Otherwise a run that is interrupted before its first checkpoint would resume the earlier.
        """
        for path, old in self._earlier():
            if path.exists():
                path.replace(old)

    def _earlier(self) -> list[tuple[Path, Path]]:
        """Return the paths of the files that rank 0 writes, and those of an earlier run's."""
        if self._folder is None or world()[0] > 0:
            return []
        return [(self._folder / name, self._folder / (name + ".old")) for name in _FILES]

    def save(self, place: Place, means: Means) -> None:
        """Write "last.pt". All ranks call this; only rank 0 writes."""
        if self._folder is None:
            return
        mine = {
            "start": place.random,
            "now": self.random_state(),
            "means": means.state_dict(),
            "seconds": place.seconds,
            "samples": place.samples,
        }
        rank, size = world()
        ranks: list[Any] = [mine]
        if size > 1:
            ranks = [None] * size
            torch.distributed.all_gather_object(ranks, mine)
        for part in self._parts.values():
            _collect_state(part)
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
            self._write(state, _LAST)
            for _, old in self._earlier():
                old.unlink(missing_ok=True)

    def save_after(self, epoch: int, means: Means) -> None:
        """Save the state after an epoch, and its results."""
        self.save(Place(epoch + 1, 0, self.random_state()), means)
        self.save_results()

    def save_results(self) -> None:
        """Write the history, and "best.pt" if the last epoch is the best so far."""
        if self._folder is None or world()[0] > 0:
            return
        with self._replacing(_CSV) as path:
            self.history.to_csv(path)
        with self._replacing(_JSON) as path:
            self.history.to_json(path)
        rows = [row for row in self.history if not math.isnan(row.get(self._monitor, math.nan))]
        if not rows:
            return
        best = History(rows).best(self._monitor, smallest=self._smallest)
        if best is self.history.last:
            self._write({"model": self._model.state_dict(), "row": self.history.last}, _BEST)

    def _write(self, state: Mapping[str, Any], name: str) -> None:
        """Write a state to a file of the folder.

        Raises:
            ESAMTypeError: it could not be loaded; this is checked once.
        """
        with self._replacing(name) as path:
            plain = _plain(state)
            torch.save(plain, path)
            if name == _LAST and not self._loads:
                _check_loads(plain, path)
                self._loads = True

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """Yield the path to write to instead of a file, which is replaced afterwards.

        So a process that is killed meanwhile leaves the old file.
        """
        folder = cast(Path, self._folder)
        part = folder / (name + ".part")
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(folder / name)

    def load(self, means: Means) -> tuple[Place, dict[str, Any]] | None:
        """Load "last.pt" if it exists.

        Returns:
            The position in the data and the random state there; None without a file.
        """
        if self._folder is None:
            return None
        rank, size = world()
        exists = (self._folder / _LAST).exists()
        found = sum_over_ranks([float(exists)], self._device)[0]
        if 0 < found < size:  # on all ranks, so that none waits for another
            raise ESAMValueError(
                "`folder` must be on a disk that all processes can access. Received: "
                f"folder={str(self._folder)!r}, in which {found:.0f} of {size} processes find "
                f"{_LAST}."
            )
        if not exists:
            return None
        state = _read(self._folder / _LAST)
        if len(state["ranks"]) != size:
            raise ESAMValueError(
                "Training must resume with as many processes as wrote the checkpoint, "
                f"{len(state['ranks'])}. Received: {size}."
            )
        if self._settings and state["settings"]:
            check_settings(state["settings"], self._settings)
        self._settings = state["settings"]
        mine = state["ranks"][rank]
        wanted, generators = len(mine["start"]["loader"]), len(generators_of(self._loaders))
        if generators != wanted:
            raise ESAMValueError(
                "`loader` and `eval_loader` must have as many generators as when the checkpoint "
                f"was written, {wanted}. Received: {generators}."
            )
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
        means.load_state_dict(mine["means"])
        place = Place(
            *(state["epoch"], state["updates"], mine["start"], state["rate"], state["data"]),
            *(mine["seconds"], mine["samples"]),
        )
        return place, mine["now"]


def _collect_state(part: Any) -> None:
    """Move the whole state of an optimizer that shards it over ranks to rank 0, which saves it."""
    inner = part.base_optimizer if isinstance(part, ESAM) else part
    collect = getattr(inner, "consolidate_state_dict", None)  # of ZeroRedundancyOptimizer
    if collect is not None:
        collect(0)


def _read(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint.

    Raises:
        ESAMValueError: it is damaged, or this version of `fit` has not written it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds
        reason = (str(error).splitlines() or [""])[0]
        raise ESAMValueError(
            "The checkpoint to resume from must be a file that `fit` has written. Received: "
            f"{path}, which cannot be read ({type(error).__name__}: {reason}). {_ANEW}"
        ) from error
    entries = state if isinstance(state, dict) else {}
    if "samples" not in (entries.get("ranks") or [{}])[0]:
        raise ESAMValueError(
            "The checkpoint to resume from must be a file that this version of `fit` has written. "
            f"Received: {path}, of another version or program. {_ANEW}"
        )
    return entries


def _check_loads(state: Mapping[str, Any], path: Path) -> None:
    """Raise if a state that has been saved to a file cannot be loaded from it."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises errors of many kinds
        names = [name for name, value in state.items() if not _is_loadable(value)]
        raise ESAMTypeError(
            "States in a checkpoint must contain only tensors, numbers, strings and containers of "
            "them, because it is loaded without running code. Received: other values in the state "
            f"of {', '.join(names)}. Turn NumPy arrays into tensors or lists."
        ) from error


def _is_loadable(value: Any) -> bool:
    """Return whether a value can be saved and loaded without running code."""
    file = io.BytesIO()
    torch.save(value, file)
    try:
        torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
    except Exception:  # torch raises errors of many kinds
        return False
    return True


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
