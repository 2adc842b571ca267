"""The training loop: with ESAM, SAM and a base optimizer; its measurements and errors."""

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
from tests.torch.scene import SUFFIX_PART
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esam_core import ESAMTypeError
from esam_torch import (
    ESAM,
    All,
    Everything,
    History,
    Momentum,
    Part,
    Previous,
    TopIncrease,
    TopLoss,
    accuracy,
    evaluate,
    fit,
)
from esam_torch.fitting import ranks
from esam_torch.fitting.data import move_batch


def _data(n=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def _model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )


def _losses(model, inputs, targets):
    outputs = model(inputs)
    return F.cross_entropy(outputs, targets, reduction="none"), outputs


def _optimizer(kind, model, lr=0.1):
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if kind == "sgd":
        return base
    if kind == "sam":
        return ESAM(base, model, perturb=Everything(), select=All())
    return ESAM(base, model, **(SUFFIX_PART if kind == "suffix-part" else {}))


def _fit(kind="esam", epochs=3, **options):
    model = _model()
    optimizer = _optimizer(kind, model)
    options = {"progress": False, "device": "cpu", **options}
    if callable(options.get("scheduler")):
        options["scheduler"] = options["scheduler"](optimizer)
    loader = DataLoader(
        _data(), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    return model, fit(model, optimizer, _losses, loader, epochs=epochs, **options)


@pytest.mark.parametrize("kind", ["sgd", "sam", "esam", "suffix-part"])
def test_one_loop_trains_with_every_kind_of_optimizer(kind):
    _, history = _fit(kind, 15, eval_loader=[_data().tensors], metrics={"accuracy": accuracy})
    assert history["epoch"] == list(range(1, 16))
    assert history["train_loss"][-1] < 0.7 * history["train_loss"][0]
    assert history["eval_accuracy"][-1] > 0.8
    assert ("sharpness" in history.columns) == (kind == "esam")


@pytest.mark.parametrize("kind", ["sgd", "esam", "suffix-part"])
def test_the_loop_equals_a_hand_written_one(kind):
    model, _ = _fit(kind, 2)
    twin = _model()
    optimizer = _optimizer(kind, twin)
    loader = DataLoader(
        _data(), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            if kind == "sgd":
                _losses(twin, *batch)[0].mean().backward()
            else:
                optimizer.backward(lambda *b: _losses(twin, *b), *batch)
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_means_are_over_samples_and_not_batches():
    inputs, targets = _data().tensors
    model = _model().eval()
    found = evaluate(
        model,
        _losses,
        [(inputs[:90], targets[:90]), (inputs[90:], targets[90:])],
        metrics={"accuracy": accuracy},
    )
    with torch.no_grad():
        outputs = model(inputs)
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-6)
    assert found["accuracy"] == (outputs.argmax(1) == targets).float().mean().item()


def test_evaluation_restores_the_modes():
    model = _model().train()
    model[1].eval()
    evaluate(model, _losses, [_data().tensors])
    assert model.training and model[0].training and not model[1].training


def test_schedulers_step_each_epoch_or_each_batch():
    def halving(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    _, history = _fit(epochs=2, scheduler=halving)
    assert history["learning_rate"] == [0.1, 0.05]
    _, history = _fit(epochs=2, scheduler=halving, scheduler_step="batch")
    assert history["learning_rate"] == [0.1, 0.1 / 2**5]


def test_reduce_lr_on_plateau_gets_the_evaluation_loss():
    def on_plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=10.0, threshold_mode="abs"
        )

    _, history = _fit(epochs=3, scheduler=on_plateau, eval_loader=[_data().tensors])
    assert history["learning_rate"] == [0.1, 0.1, 0.05]


def test_a_dictionary_is_passed_as_one_argument():
    inputs, targets = _data().tensors

    def losses(model, batch):
        return _losses(model, batch["inputs"], batch["targets"])

    model = _model()
    batch = {"inputs": inputs, "targets": targets}
    history = fit(
        model, _optimizer("esam", model), losses, [batch], epochs=1, progress=False, device="cpu"
    )
    assert len(history) == 1


@pytest.mark.parametrize("progress", [True, "rich", "tqdm", "plain"])
def test_progress_is_shown(progress, capsys):
    if isinstance(progress, str) and progress != "plain":
        pytest.importorskip(progress)
    _fit(epochs=2, progress=progress, title="ESAM ", eval_loader=[_data().tensors])
    shown = "".join(capsys.readouterr())
    assert "ESAM epoch 2/2" in shown and "eval_loss" in shown


def test_without_a_progress_library_there_are_lines(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _fit(epochs=1)
    _fit(epochs=1, progress=True)
    assert capsys.readouterr().out.startswith("epoch 1/1  train_loss")
    with pytest.raises(RuntimeError, match="pip install rich"):
        _fit(epochs=1, progress="rich")


def test_best_and_last_rows():
    rows = []
    _, history = _fit(epochs=3, eval_loader=[_data().tensors], on_epoch=rows.append)
    assert rows == history.rows
    assert history.last is history.rows[-1]
    assert history.best("eval_loss", smallest=True)["eval_loss"] == min(history["eval_loss"])
    with pytest.raises(KeyError, match="eval_accuracy"):
        history["eval_accuracy"]


def test_invalid_arguments_are_refused():
    model = _model()
    esam = _optimizer("esam", model)
    batches = [_data().tensors]
    with pytest.raises(TypeError, match="`model` must be"):
        fit(torch.nn.Linear, esam, _losses, batches, epochs=1, progress=False)
    with pytest.raises(TypeError, match="`optimizer` must be"):
        fit(model, "sgd", _losses, batches, epochs=1, progress=False)
    with pytest.raises(ValueError, match="an ESAM of another model"):
        fit(_model(), esam, _losses, batches, epochs=1, progress=False)
    with pytest.raises(ValueError, match="`epochs` must be >= 1"):
        fit(model, esam, _losses, batches, epochs=0, progress=False)
    with pytest.raises(ValueError, match="`scheduler_step`"):
        fit(model, esam, _losses, batches, epochs=1, scheduler_step="step", progress=False)
    with pytest.raises(ValueError, match="yield a batch"):
        fit(model, esam, _losses, [], epochs=1, progress=False)
    with pytest.raises(ValueError, match="`progress`"):
        fit(model, esam, _losses, batches, epochs=1, progress="loud")

    def alone(model, inputs, targets):
        return _losses(model, inputs, targets)[0]

    with pytest.raises(ValueError, match=r"\(losses, outputs\)"):
        fit(model, esam, alone, batches, epochs=1, metrics={"a": accuracy}, progress=False)
    with pytest.raises(TypeError, match="one number per sample"):
        fit(
            *(model, _optimizer("esam", model), _losses, batches),
            epochs=1,
            metrics={"a": lambda o, *b: o.mean()},
            progress=False,
        )


@pytest.mark.parametrize("kind", ["sgd", "esam", "suffix-part"])
def test_accumulated_batches_are_averaged_and_clipped(kind):
    batches = [tuple(part[i : i + 10] for part in _data().tensors) for i in range(0, 50, 10)]
    options = {"accumulate": 2, "clip_value": 0.02, "clip_norm": 0.05}
    model, twin = _model(), _model()
    fit(
        *(model, _optimizer(kind, model), _losses, batches),
        epochs=1,
        progress=False,
        device="cpu",
        **options,
    )
    optimizer = _optimizer(kind, twin)
    for group in (batches[:2], batches[2:4], batches[4:]):
        optimizer.zero_grad()
        for batch in group:
            if kind == "sgd":
                _losses(twin, *batch)[0].mean().backward()
            else:
                optimizer.backward(lambda *b: _losses(twin, *b), *batch)
        for parameter in twin.parameters():
            parameter.grad /= len(group)
        torch.nn.utils.clip_grad_value_(twin.parameters(), 0.02)
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sgd", "esam", "suffix-part"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions(kind, precision):
    dtypes = set()

    def losses(model, inputs, targets):
        outputs = model(inputs)
        dtypes.add(outputs.dtype)
        return F.cross_entropy(outputs, targets, reduction="none"), outputs

    model = _model()
    optimizer = _optimizer(kind, model)
    batches = [_data().tensors] * 4
    history = fit(
        *(model, optimizer, losses, batches),
        epochs=6,
        eval_loader=batches,
        precision=precision,
        clip_norm=10.0,
        progress=False,
        device="cpu",
    )
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert history["eval_loss"][-1] < 0.8 * history["eval_loss"][0]


def test_an_overflow_skips_update_and_scheduler():
    """The scaler finds it; the weights do not change, and the scheduler does not step."""
    model = _model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = [p.clone() for p in model.parameters()]
    fit(
        *(model, optimizer, _losses, [_data().tensors]),
        epochs=1,
        precision="fp16",
        scaler=scaler,
        scheduler=scheduler,
        scheduler_step="batch",
        progress=False,
        device="cpu",
    )
    assert scaler.get_scale() == 2.0**39 and base.param_groups[0]["lr"] == 0.1
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="`precision` must be"):
        fit(model, optimizer, _losses, [], epochs=1, scaler=scaler, device="cpu", progress=False)
    optimizer = ESAM(base, model, on_nonfinite="skip")
    with pytest.raises(ValueError, match="`on_nonfinite` must be"):
        fit(model, optimizer, _losses, [], epochs=1, precision="fp16", device="cpu", progress=False)


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
    model, history = _fit(epochs=3, eval_loader=[_data().tensors], folder=tmp_path)
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
    again, resumed = _fit(epochs=3, eval_loader=[_data().tensors], folder=tmp_path, resume=True)
    assert resumed.rows == history.rows
    assert torch.equal(again[0].weight, model[0].weight)
    # The monitor may be the accuracy, for which more is better.
    options = {"metrics": {"accuracy": accuracy}, "eval_loader": [_data().tensors]}
    _, history = _fit(epochs=3, folder=tmp_path / "b", monitor="eval_accuracy", **options)
    best = torch.load(tmp_path / "b" / "best.pt", weights_only=True)
    assert best["row"]["eval_accuracy"] == max(history["eval_accuracy"])


def _batches(*bad, n=4):
    """Return batches of 10 samples; those with the given positions are NaN."""
    inputs, targets = _data().tensors
    places = [slice(10 * i, 10 * i + 10) for i in range(n)]
    return [
        (inputs[p] * (torch.nan if i in bad else 1.0), targets[p]) for i, p in enumerate(places)
    ]


def _skipping(model, on_nonfinite="skip"):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return ESAM(base, model, on_nonfinite=on_nonfinite)


_QUIETLY = {"epochs": 1, "progress": False, "device": "cpu"}


def test_losses_of_skipped_steps_are_left_out_of_the_means():
    model, twin = _model(), _model()
    row = fit(
        *(model, _skipping(model), _losses, _batches(1)), metrics={"accuracy": accuracy}, **_QUIETLY
    ).last
    optimizer, kept, right = _skipping(twin), [], []
    for i, batch in enumerate(_batches(1)):
        report = optimizer.step(lambda *b: _losses(twin, *b), *batch)
        assert report.skipped == (i == 1)
        if i != 1:
            kept += report.losses.tolist()
            right += accuracy(report.outputs, *batch).tolist()
    assert row["train_loss"] == pytest.approx(sum(kept) / len(kept), rel=1e-6)
    assert row["train_accuracy"] == pytest.approx(sum(right) / len(right))
    assert row["sample_share"] == 0.5  # without the reports of skipped steps
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ascend", [Part(0.25), Previous(), Momentum()])
@pytest.mark.parametrize("select", [All(), TopLoss(0.5), TopIncrease(0.5)])
def test_means_are_over_the_samples_that_a_step_reports(ascend, select):
    """With these directions, a pass may have seen only some of the samples in a batch."""

    def optimizer(model):
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return ESAM(base, model, ascend=ascend, select=select)

    model, twin = _model(), _model()
    row = fit(
        *(model, optimizer(model), _losses, _batches()), metrics={"accuracy": accuracy}, **_QUIETLY
    ).last
    esam, seen, right = optimizer(twin), [], []

    def noted(inputs, targets):
        values, outputs = _losses(twin, inputs, targets)
        return values, (outputs, targets)  # the targets of the same samples

    for batch in _batches():
        report = esam.step(noted, *batch)
        seen += (report.perturbed_losses if report.losses is None else report.losses).tolist()
        right += accuracy(*report.outputs).tolist()
        assert report.batch_size == 10
    assert row["train_loss"] == pytest.approx(sum(seen) / len(seen), rel=1e-6)
    assert row["train_accuracy"] == pytest.approx(sum(right) / len(right))
    assert row["samples_per_second"] * row["seconds"] == pytest.approx(40)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
def test_epochs_without_the_monitored_number_write_checkpoints(tmp_path, on_nonfinite):
    model = _model()
    optimizer = _skipping(model, on_nonfinite)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    options = {**_QUIETLY, "folder": tmp_path, "scheduler": scheduler, "scheduler_step": "batch"}
    batches = _batches(*range(4))
    history = fit(model, optimizer, _losses, batches, **{**options, "epochs": 2})
    assert all(math.isnan(value) for value in history["train_loss"])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["history.csv", "history.json", "last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3
    if on_nonfinite == "skip":
        assert optimizer.param_groups[0]["lr"] == 0.1  # no update, so no step of the scheduler
        options |= {"epochs": 3, "resume": True}
        history = fit(model, optimizer, _losses, _batches(), **options)
        best = torch.load(tmp_path / "best.pt", weights_only=True)
        assert best["row"] == history.last == history.best("train_loss", smallest=True)


def test_a_kill_between_the_two_checkpoints_loses_neither(tmp_path, monkeypatch):
    from esam_torch.fitting.checkpoints import Checkpoints

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save_best", _killed)
        with pytest.raises(KeyboardInterrupt):
            _fit(epochs=1, folder=tmp_path)
    assert (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()
    model, history = _fit(epochs=1, folder=tmp_path, resume=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["row"] == history.last
    assert torch.equal(best["model"]["0.weight"], model[0].weight)


def test_an_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    _fit(epochs=1, folder=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    save = torch.save

    def half(state, file):
        path = Path(getattr(file, "name", file))
        if not path.name.startswith("last"):
            return save(state, file)
        path.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            _fit(epochs=2, folder=tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    _, history = _fit(epochs=2, folder=tmp_path, resume=True)
    assert len(history) == 2


def _killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("bad", [0, 1])
def test_accumulated_batches_that_are_skipped_do_not_count(bad):
    """The mean is over the others; if all are skipped there is no update."""
    batches = [*_batches(bad, n=2), *_batches(0, 1, n=2)]
    model, twin = _model(), _model()
    options = {**_QUIETLY, "accumulate": 2}
    first = _skipping(twin)
    model_optimizer = _skipping(model)
    fit(model, model_optimizer, _losses, batches, **options)
    for batch in batches[:2]:
        first.backward(lambda *b: _losses(twin, *b), *batch)
    first.step()  # with the momentum of one update, not of two
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    # Skipped batches leave no pending gradients.
    assert model_optimizer.step(lambda *b: _losses(model, *b), *_batches()[0]).skipped is False


def test_invalid_monitors_are_refused_before_training(tmp_path):
    trained = []

    def refused(match, **options):
        options = {"eval_loader": [_data().tensors], **options}
        with pytest.raises(ValueError, match=match):
            _fit(on_epoch=trained.append, folder=tmp_path, **options)

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
    assert not trained


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    _, history = _fit(epochs=2, tensorboard=tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"sharpness", "train_loss", "learning_rate"} <= set(events.Tags()["scalars"])
    written = [event.value for event in events.Scalars("sharpness")]
    assert written == pytest.approx(history["sharpness"])


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"esam-torch\[tensorboard\]"):
        _fit(epochs=1, tensorboard=tmp_path)


def test_numbers_of_numpy_in_a_checkpoint_are_loaded(tmp_path):
    """As from a schedule that uses NumPy."""

    def run(epochs, **options):
        model = _model()
        optimizer = _optimizer("esam", model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: np.cos(e / 10))
        loader = [_data().tensors]
        options = {"progress": False, "device": "cpu", "folder": tmp_path, **options}
        fit(model, optimizer, _losses, loader, epochs=epochs, scheduler=scheduler, **options)
        return optimizer

    run(1)
    assert run(2, resume=True).count == 2


def test_batches_of_other_libraries_are_moved():
    class Graphs:
        def to(self, device):
            return ("moved to", device)

    device, table = torch.device("cpu"), torch.ones(2)
    moved = move_batch({"graphs": Graphs(), "x": [table], "kind": Graphs, "n": 3}, device)
    assert moved == {"graphs": ("moved to", device), "x": [table], "kind": Graphs, "n": 3}


@pytest.mark.parametrize(
    "sampler",
    [
        torch.utils.data.WeightedRandomSampler([1.0, 2.0], 2),
        torch.utils.data.SubsetRandomSampler([0, 1]),
        torch.utils.data.RandomSampler([0, 1], replacement=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_samplers_that_do_not_know_about_ranks_are_refused(sampler, monkeypatch):
    loader = DataLoader(_data(), batch_size=20, sampler=sampler)
    assert ranks.split(loader, training=True) is loader
    monkeypatch.setattr(ranks, "world", lambda: (0, 2))
    with pytest.raises(ESAMTypeError, match=f"Received: a {type(sampler).__name__}"):
        ranks.split(loader, training=True)
