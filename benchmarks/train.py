"""Train a run to its end, resuming from its checkpoint, and store its record."""

import dataclasses
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.costs import flops_ratio
from benchmarks.machine import provenance
from benchmarks.run import Run
from benchmarks.store import Store
from benchmarks.training import Probe, Trainer

__all__ = ["train", "weights_path"]


def weights_path(run: Run, folder: Path) -> Path:
    """Return the path of the trained weights of a run without a probe."""
    return folder / "weights" / f"{run.file_name()}.pt"


def train(
    run: Run,
    folder: Path,
    *,
    checkpoint_every: int = 1,
    stop_after: int | None = None,
    probe: Probe | None = None,
    keep_weights: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a run to its end, from its checkpoint if there is one, and store its record.

    A run whose record is in the folder is not repeated. The same method with a different option or
    probe is a different run.

    Args:
        run: the options.
        folder: where runs.jsonl gets a line at the end, and checkpoints/NAME.pt is kept until then.
            If a run was resumed elsewhere (machine, versions, revision or command), the record
            lists the other places.
        checkpoint_every: epochs between checkpoints.
        stop_after: epochs in this call, as if killed after them; None trains to the end.
        probe: observes each step, and adds measurements to each epoch's row.
        keep_weights: write the tested weights to weights/NAME.pt. A run whose weights are missing,
            because only its record was kept, is trained again.
        say: called with a message for each epoch.

    Returns:
        The run's record, without the last epochs if it was stopped.
    """
    options = None if probe is None else probe.options
    stem = run.file_name(options)
    saved, weights = folder / "checkpoints" / f"{stem}.pt", folder / "weights" / f"{stem}.pt"
    store = Store(folder)
    done = store.find(run, options)
    if done is not None:
        if weights.exists() or not keep_weights:
            say(f"{stem}: already done")
            return done
        say(f"{stem}: already done, but its weights are missing: training again")
    trainer = Trainer(run, observe=None if probe is None else probe.observe)
    history: list[dict[str, Any]] = []
    places: list[dict[str, Any]] = []
    if saved.exists():
        # On the host: a probe's tensors stay there, and the trainer moves its own to the device.
        state = torch.load(saved, map_location="cpu", weights_only=True)
        trainer.load(state)
        history, places = state["history"], state.get("places", [])
        if probe is not None:
            probe.load(state["probe"])
        say(f"{stem}: resumed after epoch {len(history)}")
    here = {name: value for name, value in provenance().items() if name != "time"}
    places = [*(place for place in places if place != here), here]
    first = len(history)
    for epoch in range(first, run.epochs):
        row: dict[str, Any] = {"epoch": epoch + 1, **trainer.train_epoch(epoch)}
        if (epoch + 1) % run.test_every == 0 or epoch + 1 == run.epochs:
            row.update(trainer.test())
        if probe is not None:
            row.update(probe.measure(trainer, epoch))
        history.append(row)
        tested = f"test {row['accuracy']:.2f}% " if "accuracy" in row else ""
        say(
            f"{stem}: epoch {row['epoch']}/{run.epochs} loss {row['train_loss']:.3f} "
            f"{tested}{row['seconds']:.1f} s"
        )
        stopping = stop_after is not None and epoch + 1 - first >= stop_after
        if stopping or (epoch + 1) % checkpoint_every == 0:
            kept = {} if probe is None else probe.state()
            state = {**trainer.state(), "probe": kept, "history": history, "places": places}
            _save(state, saved)
        if stopping:
            break
    record = {**_record(trainer, history, options), "earlier_places": places[:-1]}
    if len(history) == run.epochs:
        if keep_weights:
            _save(trainer.tested.state_dict(), weights)
        store.add(record)
        saved.unlink(missing_ok=True)
    return record


def _record(
    trainer: Trainer, history: list[dict[str, Any]], probe: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the record of a run."""
    run, source = trainer.run, trainer.source
    # The median: compilation and other work on the machine affect single epochs.
    epoch_seconds = statistics.median(row["seconds"] for row in history)
    images = source.steps * source.batch
    ratio = flops_ratio(run, source, trainer.steps, len(list(trainer.model.parameters())))
    return {
        "run": dataclasses.asdict(run),
        "probe": probe,
        "title": trainer.method.title,
        "norm": trainer.method.norm if trainer.method.family == "esam" else None,
        "rho": run.effective_rho,
        "data": {
            "name": source.name,
            "note": source.note,
            "training_images": source.training_images,
        },
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "final": history[-1].get("accuracy"),
        "best": max((row["accuracy"] for row in history if "accuracy" in row), default=None),
        "clock": "processor time" if trainer.device.type == "cpu" else "wall",
        "seconds": sum(row["seconds"] for row in history),
        "images_per_second": images / epoch_seconds,
        "flops_ratio": ratio,
        "history": history,
        **provenance(),
    }


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: a kill leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    torch.save(state, half)
    os.replace(half, path)
