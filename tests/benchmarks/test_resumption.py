"""Finished and killed runs are reused only for the same options and probe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.paper import fig5, fig6, fig7, imagenet, landscape
from benchmarks.run import Run
from benchmarks.store import Store
from benchmarks.train import train
from benchmarks.training import Probe

RUN = Run(method="sam", data="digits", model="resnet8", width=2, epochs=2, batch=128, images=256)
QUICK = ["--quick", "--width", "2", "--images", "256", "--epochs", "1"]


class Counting(Probe):
    """A probe that counts its calls."""

    def __init__(self, factor: int) -> None:
        self.options = {"name": "counting", "factor": factor}
        self.factor = factor
        self.asked = 0

    def observe(self, epoch: int, report: Any) -> None: ...

    def measure(self, trainer: Any, epoch: int) -> dict[str, Any]:
        self.asked += 1
        return {"found": self.factor * (epoch + 1)}


def _say(_: str) -> None: ...


def _threads_kept(run: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a command and restore torch's number of threads."""
    threads = torch.get_num_threads()
    try:
        run(arguments)
    finally:
        torch.set_num_threads(threads)


def test_a_run_of_the_same_probe_is_read(tmp_path: Path) -> None:
    first = train(RUN, tmp_path, probe=Counting(3), say=_say)
    again = Counting(3)
    assert train(RUN, tmp_path, probe=again, say=_say)["history"] == first["history"]
    assert [row["found"] for row in first["history"]] == [3, 6]
    assert again.asked == 0


@pytest.mark.parametrize("probe", [Counting(4), None])
@pytest.mark.parametrize("stop_after", [None, 1])
def test_a_run_of_another_probe_is_another_run(
    probe: Counting | None, stop_after: int | None, tmp_path: Path
) -> None:
    train(RUN, tmp_path, probe=Counting(3), stop_after=stop_after, say=_say)
    found = train(RUN, tmp_path, probe=probe, say=_say)
    assert [row.get("found") for row in found["history"]] == ([4, 8] if probe else [None, None])


def test_old_records_count_as_runs_without_a_probe(tmp_path: Path) -> None:
    train(RUN, tmp_path, say=_say)
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text().replace('"probe": null, ', ""))
    assert "probe" not in train(RUN, tmp_path, say=_say)
    train(RUN, tmp_path, probe=Counting(3), say=_say)
    assert len(Store(tmp_path).records()) == 2


@pytest.mark.parametrize(
    ("figure", "others"),
    [(fig6, ["--batches", "1"]), (fig7, ["--draws", "2"]), (fig7, ["--betas", "0.4"])],
)
def test_a_figure_reads_its_own_runs_and_not_those_of_other_options(
    figure: Any, others: list[str], tmp_path: Path
) -> None:
    arguments = [*QUICK, "--out", str(tmp_path)]
    _threads_kept(figure.main, arguments)
    (record,) = Store(tmp_path).records()
    _threads_kept(figure.main, arguments)
    assert Store(tmp_path).records() == [record]
    _threads_kept(figure.main, [*arguments, *others])
    first, second = Store(tmp_path).records()
    assert first == record
    assert second["probe"] != record["probe"]


def test_figures_5_and_7_do_not_reuse_each_others_runs(tmp_path: Path) -> None:
    _threads_kept(fig5.main, [*QUICK, "--out", str(tmp_path)])
    _threads_kept(fig7.main, [*QUICK, "--out", str(tmp_path)])
    assert [r["probe"]["name"] for r in Store(tmp_path).records()] == ["fig5", "fig7"]


def test_generated_images_are_the_same_data_in_the_next_call(tmp_path: Path) -> None:
    smallest = ["--methods", "sgd", "sam", "--width", "2", "--out", str(tmp_path)]
    _threads_kept(imagenet.table2, ["--quick", *smallest])
    made = Store(tmp_path).records()
    _threads_kept(imagenet.table2, ["--quick", *smallest])
    assert len(made) == 2
    assert Store(tmp_path).records() == made
    assert "m-sharpness 8 " in (tmp_path / "table2.md").read_text()


@pytest.mark.parametrize("name", ["fig4", "fig8"])
def test_a_landscape_of_a_record_without_its_weights_is_trained_again(
    name: str, tmp_path: Path
) -> None:
    smallest = ["--points", "2", "--samples", "32", "--methods", "sgd", "--out", str(tmp_path)]
    run = getattr(landscape, name)
    _threads_kept(run, [*QUICK, *smallest])
    found = (tmp_path / f"{name}.md").read_text()
    (weights,) = (tmp_path / "weights").glob("*.pt")
    weights.unlink()  # git ignores them: a new clone has only the record
    _threads_kept(run, [*QUICK, *smallest])
    assert weights.exists()
    assert (tmp_path / f"{name}.md").read_text() == found
