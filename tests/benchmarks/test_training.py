"""Training runs: exact resumption, the schedule, every method, the contents of a record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import accuracy
from benchmarks.accuracy import accuracy_rows
from benchmarks.costs import counted_steps
from benchmarks.machine import provenance
from benchmarks.methods import METHODS, parse_method
from benchmarks.run import Run
from benchmarks.store import Store
from benchmarks.train import train, weights_path
from benchmarks.training import Trainer, learning_rate

SMALL = {"data": "digits", "model": "resnet8", "width": 2, "epochs": 3, "batch": 128, "lr": 0.1}


def _say(_: str) -> None:
    """Ignore a message."""


@pytest.mark.parametrize(
    "method",
    ["sgd", "sgd-ema", "esam", "momentum", "part", "previous", "suffix-proportional", "peer-sam"],
)
def test_a_killed_run_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    if method == "peer-sam":
        pytest.importorskip("pytorch_optimizer")
    run = Run(method=method, seed=3, **SMALL)
    whole = train(run, tmp_path / "whole", say=_say)
    train(run, tmp_path / "cut", stop_after=2, say=_say)
    assert not Store(tmp_path / "cut").records()
    torch.manual_seed(99)  # another process has another random state
    resumed = train(run, tmp_path / "cut", say=_say)
    for a, b in zip(whole["history"], resumed["history"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert not list((tmp_path / "cut" / "checkpoints").glob("*.pt"))


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    run = Run(method="sgd", **{**SMALL, "epochs": 1})
    first = train(run, tmp_path, say=_say)
    assert train(run, tmp_path, say=_say) == json.loads(json.dumps(first))
    assert len(Store(tmp_path).records()) == 1
    train(Run(method="sgd", **SMALL), tmp_path, say=_say)
    assert [r["run"]["epochs"] for r in Store(tmp_path).records()] == [1, 3]


def test_all_methods_start_with_the_same_weights_and_batches() -> None:
    one, other = (Trainer(Run(method=m, **SMALL)) for m in ("sgd", "esam"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )
    assert torch.equal(next(one.source.epoch(1))[0], next(other.source.epoch(1))[0])


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, 100, 10, 0.4) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert 0 < rates[99] < 0.001


@pytest.mark.filterwarnings("ignore:budget=1.15 is too small")  # one of the methods compared
@pytest.mark.parametrize("name", [n for n in METHODS if n != "peer-sam"])
def test_every_method_runs_steps(name: str) -> None:
    trainer = Trainer(Run(method=name, **SMALL))
    before = trainer.model.head.weight.detach().clone()
    row = trainer.train_epoch(0)
    assert torch.isfinite(torch.tensor(row["train_loss"]))
    assert not torch.equal(before, trainer.model.head.weight)


def test_rho_0_is_the_base_optimizer() -> None:
    runs = [
        Run(method=m, **SMALL)
        for m in ("sgd", "sam@0", "momentum@0", "momentum-adaptive@0", "part@0", "previous@0")
    ]
    losses = []
    for run in runs:
        trainer = Trainer(run)
        losses.append([trainer.train_epoch(epoch)["train_loss"] for epoch in range(2)])
    assert all(row == losses[0] for row in losses)


def test_methods_are_parsed_and_refused() -> None:
    assert parse_method("sam@0.2").rho == 0.2
    with pytest.raises(ValueError, match=r"must be one of sgd, .* Received: 'smam'"):
        parse_method("smam")
    with pytest.raises(ValueError, match="must be a number >= 0"):
        parse_method("sam@big")


@pytest.mark.parametrize(
    ("method", "lowest", "highest"),
    [
        ("sam", 2.0, 2.0),
        ("swp", 1.5, 2.0),
        ("suffix-sds", 1.2, 1.5),
        ("last-sds", 1.25, 1.4),
        ("last-loss", 0.9, 1.15),
        ("part", 1.24, 1.26),
        ("suffix-part", 1.1, 1.2),
        ("part-random", 0.99, 1.01),
        ("previous", 1.0, 1.0),
        ("momentum", 1.0, 1.0),
    ],
)
def test_counted_work(method: str, lowest: float, highest: float) -> None:
    arguments = {"model": "resnet18", "width": 4, "batch": 8}
    (base,) = counted_steps(METHODS["sgd"], **arguments)
    counted = counted_steps(METHODS[method], repeats=3, **arguments)
    assert lowest <= sum(counted) / 3 / base <= highest


def test_the_table_has_one_row_per_method(tmp_path: Path, capsys) -> None:
    options = ["--methods", "sgd", "sam@0.1", "--seeds", "0", "1", "--out", str(tmp_path)]
    small = ["--model", "resnet8", "--width", "2", "--epochs", "1", "--device", "cpu"]
    accuracy.main([*options, *small])
    assert "± " in capsys.readouterr().out
    records = Store(tmp_path).records()
    assert len(records) == 4
    assert len(accuracy_rows(records)) == 2
    table = (tmp_path / "accuracy.md").read_text()
    assert "SAM" in table
    # Runs with other options are in the same file, but not in the same table.
    accuracy.main([*options, *small, "--batch", "32"])
    assert len(Store(tmp_path).records()) == 8
    accuracy.main([*options, *small])
    assert (tmp_path / "accuracy.md").read_text() == table


def test_m_sharpness_is_the_mean_of_the_parts_own_sam_gradients() -> None:
    arguments = {**SMALL, "lr": 0.0, "batch": 64, "rho": 0.5}
    whole = Trainer(Run(method="sam", m=32, **arguments))
    part = Trainer(Run(method="sam", **arguments))
    for trainer in (whole, part):  # a sample does not affect the norm of other parts
        trainer.model.eval()
    x, y = next(whole.source.epoch(0))
    whole.stepper.step(whole.losses, x, y)
    got = whole.model.head.weight.grad.clone()
    expected = torch.zeros_like(got)
    for a, b in zip(x.split(32), y.split(32), strict=True):
        part.stepper.step(part.losses, a, b)
        expected += part.model.head.weight.grad / 2
    torch.testing.assert_close(got, expected)


def test_bf16_and_channels_last_train_too() -> None:
    trainer = Trainer(Run(method="esam", bf16=True, channels_last=True, **SMALL))
    x, _ = next(trainer.source.epoch(0))
    assert trainer.model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert x.is_contiguous(memory_format=torch.channels_last)
    first, second = (trainer.train_epoch(epoch)["train_loss"] for epoch in range(2))
    assert second < first
    assert trainer.test()["accuracy"] > 10


@pytest.mark.parametrize("method", ["momentum", "momentum-adaptive"])
def test_momentum_sam_has_a_default_radius(method: str) -> None:
    assert Run(method=method, **SMALL).effective_rho > 0
    base, other = (Trainer(Run(method=m, **SMALL)) for m in ("sgd", method))
    for trainer in (base, other):
        trainer.train_epoch(0)
    assert not torch.equal(base.model.head.weight, other.model.head.weight)


def test_averaged_weights_follow_the_recursion_and_are_tested() -> None:
    trainer = Trainer(Run(method="sgd-ema", ema=0.25, **SMALL))
    expected = None
    for epoch in range(2):
        trainer.model.train()
        for x, y in trainer.source.epoch(epoch):
            trainer.stepper.step(trainer.losses, x, y)
            now = [t.detach().clone().double() for t in trainer.model.state_dict().values()]
            if expected is None:
                expected = now
            expected = [0.75 * a + 0.25 * b for a, b in zip(expected, now, strict=True)]
    averaged = trainer.stepper.averaged.state_dict()
    for (name, got), value in zip(averaged.items(), expected, strict=True):
        if got.is_floating_point():  # weights and BatchNorm's running statistics
            torch.testing.assert_close(got.double(), value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(averaged["head.weight"], trainer.model.head.weight)
    tested = trainer.test()
    trainer.model.load_state_dict(averaged)
    trainer.stepper.averaged = None
    assert trainer.test() == tested


def test_averaging_does_not_change_training() -> None:
    one, other = (Trainer(Run(method=m, **SMALL)) for m in ("sgd", "sgd-ema"))
    for trainer in (one, other):
        trainer.train_epoch(0)
    assert torch.equal(one.model.head.weight, other.model.head.weight)


def test_a_checkpoint_is_loaded_on_the_host_and_lists_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe's tensors stay on the host, also on a GPU."""
    run = Run(method="sgd", **SMALL)
    train(run, tmp_path, stop_after=1, say=_say)
    loaded = []
    real = torch.load

    def load(path: Any, **options: Any) -> Any:
        loaded.append(options["map_location"])
        return real(path, **options)

    monkeypatch.setattr(torch, "load", load)
    elsewhere = {**provenance(), "revision": "elsewhere"}
    monkeypatch.setattr("benchmarks.train.provenance", lambda: elsewhere)
    record = train(run, tmp_path, stop_after=1, say=_say)
    assert [place["revision"] for place in record["earlier_places"]] == [provenance()["revision"]]
    record = train(run, tmp_path, say=_say)  # at the same place again
    assert record["revision"] == "elsewhere" and len(record["earlier_places"]) == 1
    assert loaded == ["cpu", "cpu"]


def test_the_weights_that_are_kept_are_those_that_are_tested(tmp_path: Path) -> None:
    run = Run(method="sgd-ema", **{**SMALL, "epochs": 1})
    train(run, tmp_path, keep_weights=True, say=_say)
    kept = torch.load(weights_path(run, tmp_path), weights_only=True)
    trainer = Trainer(run)
    trainer.train_epoch(0)
    for name, value in trainer.tested.state_dict().items():
        assert torch.equal(kept[name], value)
    assert not torch.equal(kept["head.weight"], trainer.model.state_dict()["head.weight"])
