"""The table of `nox -s bench`: every method takes a step, and its FLOPs are what it promises."""

import pytest
import torch
from benchmarks import __main__ as runner
from benchmarks.speed import METHODS, measure, stepper


@pytest.fixture(scope="module")
def measured():
    """Return every method's (seconds, FLOPs) on a small network."""
    inputs, targets = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    steps = {name: stepper(method, inputs, targets, 4) for name, method in METHODS.items()}
    return measure(steps, repeats=2, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("method", "lowest", "highest"),
    [
        ("SAM", 2.0, 2.0),
        ("SWP alone", 1.5, 2.0),
        ("SDS alone", 1.8, 1.85),
        ("last two stages", 1.27, 1.33),
        ("last stage", 1.04, 1.08),
        ("last stage, by loss", 0.96, 1.0),
        ("norm layers of the last two", 1.1, 1.17),
    ],
)
def test_counted_work(measured, method, lowest, highest):
    ratio = measured[method][1] / measured["SGD"][1]
    assert lowest <= ratio <= highest


def test_every_method_is_timed(measured):
    assert measured.keys() == METHODS.keys()
    assert all(seconds > 0 for seconds, _ in measured.values())


def test_table_is_printed(capsys, monkeypatch):
    options = ["--batch", "4", "--width", "2", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["benchmarks", "speed", *options])
    assert runner.main() == 0
    printed = capsys.readouterr().out
    assert "ResNet-18 of width 2, batch 4, cpu" in printed
    assert "last stage, by loss" in printed


def test_unknown_benchmark_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks", "sped"])
    assert runner.main() == 2
    assert "speed" in capsys.readouterr().out
