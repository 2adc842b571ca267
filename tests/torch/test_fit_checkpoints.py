"""Checkpoints of `fit`: resumption, files, the best epoch, kills at any time."""

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.torch.fitted import (
    QUIETLY,
    make_batches,
    make_data,
    make_model,
    make_optimizer,
    make_skipping,
    model_losses,
    run_fit,
)

from esam_core import ESAMTypeError
from esam_torch import History, accuracy, fit


def test_best_and_last_rows():
    rows = []
    _, history = run_fit(epochs=3, eval_loader=[make_data().tensors], on_epoch=rows.append)
    assert rows == history.rows
    assert history.last is history.rows[-1]
    assert history.best("eval_loss", smallest=True)["eval_loss"] == min(history["eval_loss"])
    with pytest.raises(KeyError, match="eval_accuracy"):
        history["eval_accuracy"]


def test_an_epoch_is_kept_if_on_epoch_ends_training(tmp_path):
    """With what `on_epoch` changed before: here a schedule of its own."""

    def run(epochs, stop=0, **options):
        model = make_model()
        optimizer = make_optimizer("esam", model)

        def on_epoch(row):
            optimizer.param_groups[0]["lr"] /= 2
            if row["epoch"] == stop:
                raise StopIteration("enough")

        options = {**QUIETLY, "epochs": epochs, "on_epoch": on_epoch, **options}
        return model, fit(model, optimizer, model_losses, make_batches(), **options)

    whole, wanted = run(3)
    with pytest.raises(StopIteration, match="enough"):
        run(3, stop=2, folder=tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["row"] == History.from_json(tmp_path / "history.json").last
    model, history = run(3, folder=tmp_path, resume=True)
    assert history["train_loss"] == wanted["train_loss"]
    assert history["learning_rate"] == wanted["learning_rate"] == [0.1, 0.05, 0.025]
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def _killed_run(folder, batches):
    script = Path(__file__).parent / "fit_to_be_killed.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(batches)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if batches else 0), done.stderr
    return torch.load(folder / "result.pt", weights_only=True) if not batches else None


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path):
    whole = _killed_run(tmp_path / "whole", 0)
    folder = tmp_path / "killed"
    for batches in (11, 13):  # within an epoch, after one write and before the next
        _killed_run(folder, batches)
        assert (folder / "last.pt").exists() and not (folder / "result.pt").exists()
    resumed = _killed_run(folder, 0)
    assert resumed["count"] == whole["count"] == 28
    assert resumed["rows"] == whole["rows"]
    for name, tensor in whole["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name


def test_checkpoints_and_histories_are_files(tmp_path):
    model, history = run_fit(epochs=3, eval_loader=[make_data().tensors], folder=tmp_path)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["row"] == history.best("eval_loss", smallest=True)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(last["model"][name], tensor)
    assert History.from_json(tmp_path / "history.json").rows == history.rows
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sharpness"]) for row in rows] == history["sharpness"]
    # Already finished: nothing more is trained.
    again, resumed = run_fit(
        epochs=3, eval_loader=[make_data().tensors], folder=tmp_path, resume=True
    )
    assert resumed.rows == history.rows
    assert torch.equal(again[0].weight, model[0].weight)
    # The monitor may be the accuracy, for which more is better.
    options = {"metrics": {"accuracy": accuracy}, "eval_loader": [make_data().tensors]}
    _, history = run_fit(epochs=3, folder=tmp_path / "b", monitor="eval_accuracy", **options)
    best = torch.load(tmp_path / "b" / "best.pt", weights_only=True)
    assert best["row"]["eval_accuracy"] == max(history["eval_accuracy"])


def error(outputs, *batch):
    return 1.0 - accuracy(outputs, *batch)


@pytest.mark.parametrize(
    ("options", "smallest"),
    [
        ({"monitor": "sharpness"}, True),
        ({"monitor": "eval_loss"}, True),
        ({"monitor": "eval_accuracy"}, False),
        ({"monitor": "eval_error", "monitor_mode": "min"}, True),
        ({"monitor": "eval_error", "monitor_mode": "max"}, False),
    ],
)
def test_the_best_epoch_has_the_smallest_or_the_largest_number(options, smallest, tmp_path):
    metrics = {"accuracy": accuracy, "error": error}
    options = {**options, "metrics": metrics, "eval_loader": [make_data().tensors]}
    _, history = run_fit(epochs=4, folder=tmp_path, **options)
    best = torch.load(tmp_path / "best.pt", weights_only=True)["row"]
    assert best == history.best(options["monitor"], smallest=smallest)


@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
def test_epochs_without_the_monitored_number_write_checkpoints(tmp_path, on_nonfinite):
    model = make_model()
    optimizer = make_skipping(model, on_nonfinite)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    options = {**QUIETLY, "folder": tmp_path, "scheduler": scheduler, "scheduler_step": "batch"}
    batches = make_batches(*range(4))
    history = fit(model, optimizer, model_losses, batches, **{**options, "epochs": 2})
    assert all(math.isnan(value) for value in history["train_loss"])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["history.csv", "history.json", "last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3
    if on_nonfinite == "skip":
        assert optimizer.param_groups[0]["lr"] == 0.1  # no update, so no step of the scheduler
        options |= {"epochs": 3, "resume": True}
        history = fit(model, optimizer, model_losses, make_batches(), **options)
        best = torch.load(tmp_path / "best.pt", weights_only=True)
        assert best["row"] == history.last == history.best("train_loss", smallest=True)


@pytest.mark.parametrize("method", ["to_csv", "to_json", "best"])
def test_a_kill_between_the_files_of_the_last_epoch_loses_none(method, tmp_path, monkeypatch):
    run_fit(epochs=1, folder=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(History, method, _killed)
        with pytest.raises(KeyboardInterrupt):
            run_fit(epochs=2, folder=tmp_path, resume=True)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["row"]["epoch"] == 1
    model, history = run_fit(epochs=2, folder=tmp_path, resume=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["row"] == history.last == history.best("train_loss", smallest=True)
    assert torch.equal(best["model"]["0.weight"], model[0].weight)
    assert History.from_json(tmp_path / "history.json").rows == history.rows
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize("name", ["last.pt", "history.csv", "history.json"])
def test_an_interrupted_write_keeps_the_old_file(name, tmp_path, monkeypatch):
    """The new one is complete when it replaces the old one."""
    run_fit(epochs=1, folder=tmp_path)
    before = (tmp_path / name).read_bytes()
    replace = Path.replace

    def killed(path, target):
        if target.name == name:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run_fit(epochs=2, folder=tmp_path, resume=True)
    assert (tmp_path / name).read_bytes() == before
    _, history = run_fit(epochs=2, folder=tmp_path, resume=True)
    assert History.from_json(tmp_path / "history.json").rows == history.rows


def test_a_new_run_does_not_resume_the_earlier_one_in_its_folder(tmp_path):
    """Also if it is interrupted before its first checkpoint, and again."""
    run_fit(epochs=2, folder=tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_fit(epochs=2, folder=tmp_path, losses=_killed)
        assert not FILES & {path.name for path in tmp_path.iterdir()}
        assert (tmp_path / "last.pt.old").exists()  # until then, it is not lost
    _, history = run_fit(epochs=1, folder=tmp_path, resume=True)
    assert len(history) == 1
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_an_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run_fit(epochs=1, folder=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    save = torch.save

    def half(state, file):
        path = Path(file)
        if not path.name.startswith("last"):
            return save(state, file)
        path.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            run_fit(epochs=2, folder=tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    _, history = run_fit(epochs=2, folder=tmp_path, resume=True)
    assert len(history) == 2


def _killed(*_, **__):
    raise KeyboardInterrupt


FILES = {"last.pt", "best.pt", "history.csv", "history.json"}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (b"", r"last\.pt, which cannot be read \(EOFError: "),
        (b"half a checkpoint", r"last\.pt, which cannot be read \("),
        ({"model": {}}, r"last\.pt, of another version or program\."),
        ({"settings": {}}, r"last\.pt, of another version or program\."),
        ([1], r"last\.pt, of another version or program\."),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(written, words, tmp_path):
    path = tmp_path / "last.pt"
    if isinstance(written, bytes):
        path.write_bytes(written)
    else:
        torch.save(written, path)
    with pytest.raises(ValueError, match=words + ".*another `folder`, or resume=False"):
        run_fit(epochs=1, folder=tmp_path, resume=True)
    run_fit(epochs=1, folder=tmp_path)


def test_invalid_monitors_are_refused_before_training(tmp_path):
    trained = []

    def refused(match, **options):
        options = {"eval_loader": [make_data().tensors], **options}
        with pytest.raises(ValueError, match=match):
            run_fit(on_epoch=trained.append, folder=tmp_path, **options)

    refused("`monitor` must be one of 'train_loss', 'eval_loss', 'sharpness'", monitor="evalloss")
    refused(
        "'eval_accuracy', 'sharpness'.*'eval_acc'",
        metrics={"accuracy": accuracy},
        monitor="eval_acc",
    )
    refused("must be one of 'train_loss', 'sharpness'", monitor="eval_loss", eval_loader=None)
    refused("must be one of 'train_loss', 'eval_loss'\\.", kind="sgd", monitor="sharpness")
    refused(
        '`scheduler_step` must be "epoch" for a ReduceLROnPlateau',
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau,
        scheduler_step="batch",
    )
    refused(r"`monitor` must be one of .*'rejected_sharpness'\.", monitor="gradient_norm")
    refused(
        '`monitor_mode` must be "min" or "max" for a metric other than an accuracy',
        metrics={"error": error},
        monitor="eval_error",
    )
    refused("`monitor_mode` must be one of 'min', 'max'", monitor_mode="smallest")
    assert not trained


def test_numbers_of_numpy_in_a_checkpoint_are_loaded(tmp_path):
    """As from a schedule that uses NumPy."""

    def run(epochs, **options):
        model = make_model()
        optimizer = make_optimizer("esam", model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: np.cos(e / 10))
        loader = [make_data().tensors]
        options = {"progress": False, "device": "cpu", "folder": tmp_path, **options}
        fit(model, optimizer, model_losses, loader, epochs=epochs, scheduler=scheduler, **options)
        return optimizer

    run(1)
    assert run(2, resume=True).count == 2


@pytest.mark.parametrize("part", ["model", "scheduler"])
def test_a_checkpoint_that_could_not_be_loaded_is_refused_when_it_is_written(part, tmp_path):
    """Not when the run resumes, after a night of training."""

    class Extra(torch.nn.Identity):
        def get_extra_state(self):
            return table

    table = np.linspace(0.1, 0.0, 4)

    class Scheduler(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer):
            self.table = table if part == "scheduler" else None
            super().__init__(optimizer)

        def get_lr(self):
            return self.base_lrs

    model = make_model()
    if part == "model":
        model.append(Extra())
    optimizer = make_optimizer("esam", model)
    options = {"scheduler": Scheduler(optimizer), "folder": tmp_path, "progress": False}
    with pytest.raises(ESAMTypeError, match=rf"in the state of {part}\. Turn NumPy arrays"):
        fit(model, optimizer, model_losses, make_batches(), epochs=2, **options)
    assert not (tmp_path / "last.pt").exists()
