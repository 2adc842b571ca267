"""The study's harness: the plan follows the protocol, and workers neither lose nor repeat runs."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.run import Run
from benchmarks.store import Store, key_of
from benchmarks.study import command, workers
from benchmarks.study.fit import FIT, Fit
from benchmarks.study.planning import make_plan
from benchmarks.study.settings import CONTENDERS, METHODS, QUICK, SETTINGS, Cell
from benchmarks.study.workers import claim_run, folder_of, work
from benchmarks.train import train
from benchmarks.training import Trainer

ROOT = Path(__file__).parents[2]


def _record(run: Run, final: float) -> dict[str, Any]:
    return {"run": dataclasses.asdict(run), "probe": FIT, "final": final}


def _distance(value: float, best: float) -> float:
    """Return the distance of a value from the best one, in factors of two."""
    return abs(math.log2(value / best))


#: The seeds of `QUICK`'s tuning runs.
TUNING = QUICK.tuning_seeds


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_reported_seeds_are_not_used_for_tuning(setting: Any) -> None:
    assert not set(setting.seeds) & set(setting.tuning_seeds)
    assert setting.main in setting.budgets


def test_a_finished_plan_has_the_contenders_at_every_budget_and_all_at_the_main_one() -> None:
    records: list[dict[str, Any]] = []
    while not (plan := make_plan(QUICK, records)).done:
        assert plan.runs
        records += [  # as if runs ended in their order
            _record(run, 50.0 - _distance(run.lr, 0.05) - _distance(run.batch, 32))
            for run in plan.runs[:50]
        ]
    assert len({key_of(record) for record in records}) == len(records)
    reported = [Run(**r["run"]) for r in records if r["run"]["seed"] in QUICK.seeds]
    for method in METHODS:
        found = [run for run in reported if run.method == method]
        assert {run.seed for run in found} == set(QUICK.seeds)
        assert {run.batch for run in found} == {32}
        budgets = QUICK.budgets if method in CONTENDERS else (QUICK.main,)
        epochs = [QUICK.epochs(method, budget) for budget in budgets]
        assert Counter(run.epochs for run in found) == Counter(2 * epochs)


def _tune_all(methods: Collection[str]) -> list[dict[str, Any]]:
    """Return the records of all tuning runs of some methods of `QUICK`."""
    records: list[dict[str, Any]] = []
    while asked := [
        run
        for run in make_plan(QUICK, records).runs
        if run.seed in TUNING and run.method in methods
    ]:
        records += [_record(run, 50.0 - _distance(run.batch, 32)) for run in asked]
    return records


def test_reported_runs_start_with_the_contenders_and_are_ordered_by_seed() -> None:
    runs = make_plan(QUICK, _tune_all(METHODS)).runs
    stages = [[(name, budget) for name in CONTENDERS] for budget in (2, 4)]
    stages.append([(name, 2) for name in METHODS if name not in CONTENDERS])
    expected = [
        (name, QUICK.epochs(name, budget), seed)
        for stage in stages
        for seed in QUICK.seeds
        for name, budget in stage
    ]
    assert [(run.method, run.epochs, run.seed) for run in runs] == expected


def test_points_that_decide_nothing_come_last() -> None:
    points = SETTINGS["small"].points()
    rest = [name for name in METHODS if name not in (*CONTENDERS, "esam", "sgd-ema")]
    assert points[-len(rest) * 2 :] == [(name, budget) for budget in (10, 40) for name in rest]


def test_tuned_methods_are_compared_before_the_others_are_tuned() -> None:
    runs = make_plan(QUICK, _tune_all(("sgd", "sam"))).runs
    count = 2 * len(QUICK.seeds)
    assert {run.method for run in runs[:count]} == {"sgd", "sam"}
    assert not any(run.seed in TUNING for run in runs[:count])
    assert (runs[count].method, runs[count].seed) == ("suffix-part", TUNING[0])


def test_a_worker_skips_a_run_that_another_has_locked(tmp_path: Path) -> None:
    run = QUICK.run("sgd", Cell(32, 0.05), 2, 0)
    with claim_run(run, tmp_path) as first, claim_run(run, tmp_path) as second:
        assert first
        assert not second
    with claim_run(run, tmp_path) as again:
        assert again


def test_a_second_worker_continues_after_the_first(tmp_path: Path) -> None:
    assert work([QUICK], tmp_path, most=2, say=lambda _: None) == 2
    first = Store(folder_of(QUICK, tmp_path)).records()
    assert work([QUICK], tmp_path, most=1, say=lambda _: None) == 1
    records = Store(folder_of(QUICK, tmp_path)).records()
    assert records[:2] == first
    assert len({key_of(record) for record in records}) == 3
    last = records[-1]["history"][-1]
    assert 0.0 <= last["training_accuracy"] <= 100.0
    assert {"machine", "versions", "command", "revision", "flops_ratio"} <= records[0].keys()


def test_two_processes_execute_each_run_once(tmp_path: Path) -> None:
    command.main(["--quick", "--jobs", "2", "--runs", "3", "--out", str(tmp_path)])
    records = Store(folder_of(QUICK, tmp_path)).records()
    assert len(records) == 6
    assert len({key_of(record) for record in records}) == 6


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as in the worker's process: the number of threads changes the rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_workers_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    setting = dataclasses.replace(
        QUICK, shared={**QUICK.shared, "images": 600}, budgets=(12,), main=12
    )
    (tmp_path / "kill.py").write_text(
        "import dataclasses, pathlib, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from benchmarks.study.settings import QUICK\n"
        "from benchmarks.study.workers import work\n"
        "setting = dataclasses.replace(QUICK, shared={**QUICK.shared, 'images': 600},\n"
        "                              budgets=(12,), main=12)\n"
        "work([setting], pathlib.Path(sys.argv[1]), most=1)\n"
    )
    out = tmp_path / "out"
    folder = folder_of(setting, out)
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "kill.py"), str(out)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/*.pt")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("checkpoints/*.pt"))
    assert Store(folder).records() == []
    said: list[str] = []
    assert work([setting], out, most=1, say=said.append) == 1
    assert any("resumed after epoch" in text for text in said)
    (record,) = Store(folder).records()
    whole = train(Run(**record["run"]), tmp_path / "whole", probe=Fit(), say=lambda _: None)
    for a, b in zip(record["history"], whole["history"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
    assert not list(folder.glob("checkpoints/*.pt"))


def _fit(method: str) -> tuple[Trainer, dict[str, Any], list[int]]:
    """Train a run under a `Fit`, and count by hand which samples each descent left out."""
    fit = Fit()
    fields = {**QUICK.shared, "batch": 32, "epochs": 3, "gamma": 0.25}
    seen: list[int] = []

    def observe(epoch: int, report: Any) -> None:
        fit.observe(epoch, report)
        order = trainer.source.order(epoch)
        place = len(seen) % trainer.source.steps
        batch = order[32 * place : 32 * (place + 1)]
        kept = set(batch[report.indices].tolist()) if report is not None else set(batch.tolist())
        left_out.update(i for i in batch.tolist() if i not in kept)
        seen.append(place)

    left_out: Counter[int] = Counter()
    trainer = Trainer(Run(method=method, **fields), observe=observe)
    for epoch in range(3):
        trainer.train_epoch(epoch)
        found = fit.measure(trainer, epoch)
        assert (found != {}) == (epoch == 2)
    counts = [left_out[i] for i in range(len(trainer.source.data.train))]
    return trainer, found, counts


def test_the_most_rejected_quarter_of_the_samples() -> None:
    trainer, found, counts = _fit("sds")
    _, right = trainer.outcomes(trainer.source.training())
    assert found["training_accuracy"] == pytest.approx(100 * float(right.mean()))
    assert sum(counts) == 3 * 4 * 24  # three epochs of four batches, which keep 8 of 32
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    parts = torch.tensor(order).tensor_split(4)
    assert found["accuracy_by_rejection"] == [100 * float(right[p].mean()) for p in parts]
    means = [sum(counts[i] for i in p.tolist()) / len(p) for p in parts]
    assert found["left_out_by_rejection"] == pytest.approx(means)
    assert means[0] < means[3]


def test_the_order_of_the_images_in_an_epoch() -> None:
    trainer = Trainer(Run(method="sgd", **{**QUICK.shared, "batch": 32}, augment=False))
    x, _ = next(trainer.source.epoch(5))
    plain = torch.cat([images for images, _ in trainer.source.training(batch=40)])
    torch.testing.assert_close(x, plain[trainer.source.order(5)[:32]])


def test_a_method_that_rejects_no_samples_has_one_accuracy() -> None:
    _, found, _ = _fit("sgd")
    assert found.keys() == {"training_loss", "training_accuracy", "recomputed_accuracy"}


def test_recomputed_statistics_are_used_for_one_test_and_then_restored() -> None:
    trainer = Trainer(Run(method="previous", **{**QUICK.shared, "batch": 32, "epochs": 1}))
    trainer.train_epoch(0)
    with torch.no_grad():  # wrong statistics
        for name, buffer in trainer.model.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(1e4)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    found = Fit().measure(trainer, 0)
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    torch.optim.swa_utils.update_bn((x for x, _ in trainer.source.training()), trainer.model)
    assert found["recomputed_accuracy"] == trainer.test()["accuracy"]
    assert found["recomputed_accuracy"] != pytest.approx(found["training_accuracy"])


def test_a_stopped_run_counts_the_rejected_samples_of_all_its_epochs(tmp_path: Path) -> None:
    run = Run(method="sds", **{**QUICK.shared, "batch": 32, "epochs": 3})
    whole = train(run, tmp_path / "whole", probe=Fit(), say=lambda _: None)
    train(run, tmp_path / "cut", probe=Fit(), stop_after=2, say=lambda _: None)
    resumed = train(run, tmp_path / "cut", probe=Fit(), say=lambda _: None)
    for name in ("accuracy_by_rejection", "left_out_by_rejection"):
        assert resumed["history"][-1][name] == whole["history"][-1][name]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_budget_is_the_same_compute_for_every_method(name: str) -> None:
    setting = SETTINGS[name]
    for budget in setting.budgets:
        for method, cost in METHODS.items():
            run = setting.run(method, Cell(32, 0.05, 0.1), budget, 0)
            real = setting.costs.get(method, cost)
            assert run.epochs * real == pytest.approx(budget, rel=0.05)


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["large"])
    assert "SETTING must be one of small, fresh, noisy" in capsys.readouterr().err


def test_a_setting_for_a_gpu_is_not_run_unless_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--plan", "--out", str(tmp_path)])
    assert "full:" not in capsys.readouterr().out
    command.main(["full", "--plan", "--out", str(tmp_path)])
    assert "full: 45 runs can be made now" in capsys.readouterr().out


def test_the_plan_is_shown_without_running_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "train", None)
    command.main(["small", "--plan", "--out", str(tmp_path)])
    assert "small: 67 runs can be made now" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = make_plan(QUICK, []).runs
    made: list[str] = []

    def record(run: Run, folder: Path, **_: Any) -> None:
        if run == planned[0]:
            raise RuntimeError("out of memory")
        made.append(run.method)
        Store(folder).add({"run": dataclasses.asdict(run), "probe": FIT, "final": 50.0})

    monkeypatch.setattr(workers, "train", record)
    said: list[str] = []
    name = planned[0].file_name(FIT)
    with pytest.raises(workers.FailedRunsError, match=f"^1 runs failed: {name}"):
        work([QUICK], tmp_path, wait=0.0, say=said.append)
    assert len(made) >= len(planned) - 1
    (text,) = said
    assert "out of memory" in text and "Traceback" in text
