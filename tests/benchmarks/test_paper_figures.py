"""The quantities in the paper's tables and figures, compared with known numbers."""

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.paper import comparison, fig6, fig7, savings
from benchmarks.paper.fig5 import Splits
from benchmarks.paper.fig6 import Cosines, _subsets
from benchmarks.paper.fig7 import Linearity
from benchmarks.paper.gradients import length
from benchmarks.published import SAVINGS
from benchmarks.run import Run
from benchmarks.training import Trainer
from torch.nn import functional as F

SMALL = {"data": "digits", "model": "resnet8", "width": 2, "epochs": 1, "batch": 32, "images": 64}


def test_figure_5_separates_selected_and_rejected_losses() -> None:
    splits = Splits()
    for scale in (1.0, 3.0):  # two steps, whose mean is 2
        report = SimpleNamespace(
            losses=scale * torch.tensor([1.0, 2.0, 3.0, 4.0]),
            perturbed_losses=scale * torch.tensor([11.0, 2.0, 33.0, 5.0]),
            indices=torch.tensor([0, 2]),
        )
        splits.observe(0, report)
    assert splits.measure(None, 0) == {
        "selected before": 2 * 2.0,
        "selected after": 2 * 22.0,
        "rejected before": 2 * 3.0,
        "rejected after": 2 * 3.5,
        "batch before": 2 * 2.5,
        "batch after": 2 * 12.75,
    }


def test_figure_6_labels_subsets_correctly() -> None:
    losses = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    increase = torch.tensor([0.1, 0.5, -0.2, 0.3, 0.2])
    subsets = _subsets(losses, increase, np.array([2, 4]))
    assert {name: sorted(chosen.tolist()) for name, chosen in subsets.items()} == {
        "largest increase": [1, 3],
        "smallest increase": [0, 2],
        "random": [2, 4],
        "largest loss": [0, 2],
    }


def test_figure_6_uses_gradients_at_sams_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(Run(method="sam", rho=0.5, gamma=0.25, augment=False, **SMALL))
    x, y = next(trainer.source.epoch(0))
    parameters = list(trainer.model.parameters())
    copies = [p.detach().clone() for p in parameters]

    def losses() -> torch.Tensor:
        return F.cross_entropy(trainer.model(x), y, reduction="none")

    trainer.model.train()
    before = losses()
    gradient = torch.autograd.grad(before.mean(), parameters)
    norm = torch.sqrt(sum(g.square().sum() for g in gradient))
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            p.add_(0.5 * g / norm)
        increase = losses() - before
        for p, c in zip(parameters, copies, strict=True):
            p.copy_(c)
    seen: list[Any] = []

    def subsets(*given: Any) -> dict[str, torch.Tensor]:
        seen.extend(given)
        return _subsets(*given)

    monkeypatch.setattr(fig6, "_subsets", subsets)
    found = Cosines(1).measure(trainer, 0)
    torch.testing.assert_close(seen[0], before.detach())
    torch.testing.assert_close(seen[1], increase, rtol=1e-3, atol=1e-4)
    assert sorted(set(seen[2].tolist())) == seen[2].tolist()
    assert len(seen[2]) == 8  # a quarter of the batch
    assert seen[2].tolist() != sorted(increase.topk(8).indices.tolist())
    assert found.keys() == set(fig6.NAMES)
    assert found["largest increase"] > found["smallest increase"]


def test_figure_7_uses_the_steps_length_and_sams(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(Run(method="esam", rho=0.2, **SMALL))
    monkeypatch.setattr(fig7, "_zeta", lambda _p, _x, _y, _g, epsilon: length(epsilon))
    found = Linearity([0.25, 0.5], 1, 2).measure(trainer, 0)
    assert found == {
        "beta = 0.25, the step's length": pytest.approx(0.8, rel=1e-5),
        "beta = 0.25, SAM's length": pytest.approx(0.2, rel=1e-5),
        "beta = 0.5, the step's length": pytest.approx(0.4, rel=1e-5),
        "beta = 0.5, SAM's length": pytest.approx(0.2, rel=1e-5),
        "SAM, the step's length": pytest.approx(0.2, rel=1e-5),
        "SAM, SAM's length": pytest.approx(0.2, rel=1e-5),
    }


def test_a_small_mask_saves_most_of_the_time_and_flops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    real = savings.masked_gradients

    def gradients(loss: torch.Tensor, chosen: list[torch.Tensor]) -> None:
        now[0] += len(chosen)  # each tensor takes a second, the forward pass no time
        real(loss, chosen)

    monkeypatch.setattr(savings, "time", SimpleNamespace(process_time=lambda: now[0]))
    monkeypatch.setattr(savings, "masked_gradients", gradients)
    options = argparse.Namespace(width=8, batch=4, repeats=5, masks=20)
    small, large = savings._measure(8, [0.25, 0.9], options, bias=False)
    assert small["time_saved"] == pytest.approx(0.75, abs=0.1)
    assert large["time_saved"] == pytest.approx(0.1, abs=0.1)
    assert 0.0 < large["flops_saved"] < small["flops_saved"] < 2 / 3  # the forward pass stays


def test_a_comparison_shows_speed_relative_to_sam(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds = {"sgd": [190.0, 210.0], "sam": [90.0, 110.0], "esam": [130.0, 130.0]}

    def train(run: Run, _folder: Path, **_: Any) -> dict[str, Any]:
        return {
            "run": dataclasses.asdict(run),
            "data": {"name": run.data, "note": "1000 images" if run.images else ""},
            "title": run.method.upper(),
            "machine": {"accelerator": "a GPU"},
            "final": 95.0,
            "best": 96.0,
            "flops_ratio": 1.5,
            "images_per_second": speeds[run.method][run.seed],
        }

    monkeypatch.setattr(comparison, "train", train)
    runs = [
        Run(method=method, data="cifar10", model="resnet18", seed=seed)
        for method in speeds
        for seed in (0, 1)
    ]
    comparison.compare("table1", "a title", runs, argparse.Namespace(out=tmp_path))
    cells = json.loads((tmp_path / "table1.json").read_text())["cells"]
    shown = {cell["method"]: cell["relative_speed"] for cell in cells}
    assert shown == {"sgd": 2.0, "sam": 1.0, "esam": 1.3}
    lines = (tmp_path / "table1.md").read_text().splitlines()
    rows = {line.split()[3]: line for line in lines if line.startswith("| cifar10")}
    assert rows["ESAM"].split("|")[5:9] == [" 130 ", " 2409 ", " 130% ", " 140% "]  # ours first
    assert rows["SGD"].split("|")[5:9] == [" 200 ", " 3387 ", " 200% ", " 197% "]
    shown = [cell.split()[0] for cell in rows["SGD"].split("|")[2:5]]
    assert shown == ["95.00", "96.00", "95.41"]  # final, best, and the paper's best
    part = [dataclasses.replace(run, images=1000) for run in runs]
    for real, ours in ((True, part), (False, runs)):
        out = argparse.Namespace(out=tmp_path)
        comparison.compare("table1", "a title", ours, out, real=real)
        lines = (tmp_path / "table1.md").read_text().splitlines()
        cells = next(line for line in lines if "cifar10" in line).split("|")
        assert (cells[4].strip(), cells[6].strip()) == ("", "")  # not the paper's data


@pytest.mark.parametrize("name", ["table4", "table5"])
def test_all_printed_savings_are_shown_beside_ours(name: str, tmp_path: Path) -> None:
    options = ["--layers", "2", "50", "--betas", "0.5", "0.9"]
    options += ["--repeats", "1", "--masks", "2", "--width", "4"]
    getattr(savings, name)(["--quick", *options, "--out", str(tmp_path)])
    lines = (tmp_path / f"{name}.md").read_text().splitlines()[4:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    cells = [row for row in cells if row[0] != "2"]  # which the paper does not print
    shown = {(int(n), float(beta)): float(printed) for n, beta, *_, printed in cells}
    printed = {(n, beta): g for n, row in SAVINGS[name].items() for beta, g in row.items()}
    assert shown == printed
    ours = {(int(n), float(beta)): time for n, beta, time, *_ in cells}
    assert "not yet measured" not in (ours.pop((50, 0.5)), ours.pop((50, 0.9)))
    assert set(ours.values()) == {"not yet measured"}
