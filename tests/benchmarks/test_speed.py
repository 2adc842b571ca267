"""The speed benchmark: counts agree between devices, times are interleaved, bars are met."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as runner
from benchmarks import speed
from benchmarks.costs import counted_steps
from benchmarks.methods import METHODS, make_stepper
from benchmarks.models import build
from benchmarks.timing import peak_memory, time_interleaved
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("name", ["sam", "esam", "suffix-sds", "sds-proportional"])
def test_counts_on_the_meta_device_equal_those_of_a_real_step(name: str) -> None:
    counted = counted_steps(METHODS[name], model="resnet8", width=4, batch=8, repeats=3)
    model = build("resnet8", classes=10, width=4)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))

    def losses(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(a), b, reduction="none")

    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    stepper = make_stepper(METHODS[name], sgd, model, model_name="resnet8", rho=0.1, steps=1)
    stepper.step(losses, x, y)
    for expected in counted:
        with FlopCounterMode(display=False) as counter:
            stepper.step(losses, x, y)
        assert counter.get_total_flops() == expected


def test_full_resnet18_meets_its_bars() -> None:
    for record in speed.flops_bars(masks=3):
        if not METHODS[record["method"]].random:  # these need 100 masks: in the benchmark itself
            assert record["flops_ratio"] <= record["bar"] + 5e-4, record["title"]
        if record["method"] == "empty":
            assert record["flops_ratio"] == 1.0


def test_rounds_run_each_step_once() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    times, ratios = time_interleaved(steps, repeats=4, warmup=1, device=torch.device("cpu"))
    for i in range(5):
        assert sorted(calls[3 * i : 3 * i + 3]) == ["a", "b", "c"]
    assert ratios["a"].median == 1.0
    assert all(t.low <= t.median <= t.high for t in times.values())


def test_peak_memory_includes_freed_memory() -> None:
    def step() -> None:
        a = torch.empty(1_000_000)
        b = torch.empty(2_000_000)
        del a, b
        torch.empty(500_000)

    assert peak_memory(step, torch.device("cpu")) == pytest.approx(12e6, rel=0.01)


def test_command_writes_json_table_and_plot(tmp_path: Path, capsys) -> None:
    speed.main(
        [
            *("--models", "resnet8", "--width", "2", "--size", "8", "--batch", "4"),
            *("--repeats", "1", "--warmup", "0", "--masks", "1", "--device", "cpu"),
            *("--methods", "sam", "esam", "late-phase", "--out", str(tmp_path)),
        ]
    )
    assert "resnet8 of width 2, batch 4" in capsys.readouterr().out
    record = json.loads((tmp_path / "resnet8-cpu.json").read_text())
    assert [m["method"] for m in record["methods"]] == ["sgd", "sam", "esam", "late-phase"]
    assert record["methods"][3]["flops_ratio"] == pytest.approx(1.12)
    assert (tmp_path / "resnet8-cpu.png").stat().st_size > 5000


def test_unknown_benchmark_is_refused(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "sped"])
    assert runner.main() == 2
    assert "speed" in capsys.readouterr().out
