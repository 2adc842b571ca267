"""The runs of a command: the paper's recipes, overridden by the command line."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.methods import METHODS
from benchmarks.paper import comparison, fig3, fig5, fig6, fig7, imagenet, landscape
from benchmarks.paper.options import parse, recipe_runs
from benchmarks.recipes import RECIPES
from benchmarks.run import Run
from benchmarks.store import Store
from benchmarks.training import new_stepper

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class _Asked(Exception):  # noqa: N818  not an error: it stops a command
    """Stops a command before it trains."""


def _asked(
    monkeypatch: pytest.MonkeyPatch, module: Any, function: str, *arguments: str
) -> list[tuple[Run, Path]]:
    """Return the runs that a command would train, and their folder, without training."""
    asked: list[tuple[Run, Path]] = []

    def train(run: Run, folder: Path, **_: Any) -> dict[str, Any]:
        asked.append((run, folder))
        return {
            "run": dataclasses.asdict(run),
            "data": {"name": run.data, "note": ""},
            "title": METHODS[run.method.partition("@")[0]].title,
            "machine": {"accelerator": None, "threads": 1},
            "clock": "processor time",
            "final": 50.0,
            "best": 50.0,
            "images_per_second": 1.0,
            "flops_ratio": 1.0,
        }

    def stop(runs: Any, _probe: Any, options: Any) -> None:
        asked.extend((run, options.out) for run in runs)
        raise _Asked

    threads = torch.get_num_threads()
    monkeypatch.setattr(module, "train", train, raising=False)
    monkeypatch.setattr(module, "train_with_probes", stop, raising=False)
    monkeypatch.setattr(
        *(module, "_load_or_train", lambda run, options: stop([run], None, options)), raising=False
    )
    monkeypatch.setattr(module, "_images", lambda options: (None, None), raising=False)
    monkeypatch.setattr(comparison, "train", train)
    try:
        getattr(module, function)(list(arguments))
    except _Asked:
        pass
    finally:
        torch.set_num_threads(threads)
    return asked


def _runs(*arguments: str) -> list[Run]:
    options = parse("none", None, arguments)
    return recipe_runs(options, [options.model], [options.data], ["sgd", "sam"], arguments)


def test_a_run_has_its_models_recipe() -> None:
    run, _ = _runs("--model", "wrn28-10")
    assert (run.rho, run.beta, run.gamma) == (0.1, 0.5, 0.5)
    assert (run.epochs, run.batch, run.lr) == (200, 256, 0.05)
    (vit, _) = _runs("--model", "vit-s16")
    assert (vit.optimizer, vit.m, vit.warmup, vit.weight_decay) == ("adamw", 128, 30, 0.3)


@pytest.mark.parametrize("given", [("--rho", "0.3", "--lr", "2"), ("--rho=0.3", "--lr=2")])
def test_the_command_line_overrides_the_recipe(given: tuple[str, ...]) -> None:
    run, _ = _runs("--model", "wrn28-10", *given)
    assert (run.rho, run.lr, run.beta) == (0.3, 2.0, 0.5)


def test_a_value_is_not_taken_for_an_option() -> None:
    run, _ = _runs("--model", "wrn28-10", "--out", "rho")
    assert run.rho == 0.1


def test_quick_runs_and_models_without_a_recipe_use_only_the_options() -> None:
    for run in (*_runs("--model", "resnet10"), *_runs("--quick", "--model", "wrn28-10")):
        assert (run.rho, run.beta, run.sharp_weight_decay) == (0.05, 0.6, None)


@pytest.mark.parametrize(
    ("method", "doubled"), [("sgd", 5e-4), ("sam", 1e-3), ("esam", 1e-3), ("msam", 1e-3)]
)
def test_the_weight_decay_is_doubled_except_for_the_base_optimizer(
    method: str, doubled: float
) -> None:
    options = parse("none", None, ["--model", "resnet18"])
    same = parse("none", None, ["--model", "resnet18", "--same-weight-decay"])
    for chosen, expected in ((options, doubled), (same, 5e-4)):
        (run,) = recipe_runs(chosen, ["resnet18"], ["digits"], [method], [])
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        (group,) = new_stepper(run, model, 1).base.param_groups
        assert group["weight_decay"] == expected


def test_figure_3_trains_with_the_values_it_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = ["--values", "0.3", "0.9", "--seeds", "0", "--out", str(tmp_path)]
    asked = _asked(monkeypatch, fig3, "main", "--model", "wrn28-10", *values)
    found = [(r.method, r.rho, r.beta, r.gamma) for r, _ in asked]
    assert found == [
        ("sgd", 0.1, 0.5, 0.5),
        ("sam", 0.1, 0.5, 0.5),
        ("swp", 0.1, 0.3, 0.5),
        ("swp", 0.1, 0.9, 0.5),
        ("sds", 0.1, 0.5, 0.3),
        ("sds", 0.1, 0.5, 0.9),
    ]


def test_table_2_trains_with_m_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    for given, m in (((), 128), (("--m", "64"), 64), (("--quick",), 8), (("--quick", "--m=4"), 4)):
        asked = _asked(monkeypatch, imagenet, "table2", *given, *out)
        assert {run.m for run, _ in asked} == {m}
        assert {run.method for run, _ in asked} == {"sgd", "sam", "esam"}
        assert f"m-sharpness {m} (generated" in (tmp_path / "table2.md").read_text()


FIGURES = {
    "fig4": (landscape, "fig4"),
    "fig5": (fig5, "main"),
    "fig6": (fig6, "main"),
    "fig7": (fig7, "main"),
    "fig8": (landscape, "fig8"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_4_to_8_train_by_the_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model", "wrn28-10", "--gamma", "0.7"]
    (run, _), *_ = _asked(monkeypatch, *FIGURES[name], *arguments)
    expected = RECIPES["wrn28-10"].fields() | {"gamma": 0.7}
    assert {key: getattr(run, key) for key in expected} == expected
    (run, _), *_ = _asked(monkeypatch, *FIGURES[name], *arguments, "--same-weight-decay")
    assert run.sharp_weight_decay is None


@pytest.mark.parametrize("name", ["fig3", *FIGURES])
def test_the_command_of_a_committed_figure_gives_its_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function = (fig3, "main") if name == "fig3" else FIGURES[name]
    figure = json.loads((RESULTS / name / f"{name}.json").read_text())
    _, _, _, given, *arguments = shlex.split(figure["command"])
    assert given == name
    monkeypatch.chdir(RESULTS.parents[1])
    if name == "fig3":
        monkeypatch.setattr(fig3, "write_tables", lambda *_: None)
        monkeypatch.setattr(fig3, "write_json", lambda *_: None)
        monkeypatch.setattr(fig3, "save", lambda *_: None)
    asked = [run for run, _ in _asked(monkeypatch, module, function, *arguments, "--device", "cpu")]
    records = [Run(**record["run"]) for record in Store(RESULTS / name).records()]
    assert asked
    assert all(run in records for run in asked)


@pytest.mark.parametrize("module", [fig5, fig6, fig7])
def test_the_command_of_a_committed_figure_gives_its_probe(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module.__name__.rpartition(".")[2]
    figure = json.loads((RESULTS / name / f"{name}.json").read_text())

    def train_with_probes(_runs: Any, probe: Any, _options: Any) -> None:
        (record,) = Store(RESULTS / name).records()
        assert record["probe"] == probe().options
        raise _Asked

    monkeypatch.setattr(module, "train_with_probes", train_with_probes)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(_Asked):
            module.main(shlex.split(figure["command"])[4:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["fig4", "fig8"])
def test_a_landscape_takes_one_seed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        getattr(landscape, name)(["--quick", "--seeds", "0", "1", "2"])
    assert "--seeds must be a single seed: a landscape belongs to one run. Received: 0 1 2." in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fig5", ["--gamma", "1"], "--gamma must leave out samples of a batch of 128"),
        ("fig5", ["--gamma", "0.999"], "--gamma must leave out samples of a batch of 128"),
        ("fig5", ["--m", "16"], "--m must be 128, the batch, or more. Received: 16."),
        ("fig5", ["--rho", "0"], "must perturb, with rho > 0. Received: esam"),
        ("fig6", ["--rho", "0"], "must perturb, with rho > 0. Received: sam"),
        ("fig6", ["--method", "sgd"], "must perturb, with rho > 0. Received: sgd"),
        ("fig7", ["--rho", "0"], "must perturb, with rho > 0. Received: esam"),
        ("fig8", ["--rho", "0"], "--rho must be > 0"),
    ],
)
def test_meaningless_figures_are_refused(
    name: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, function = FIGURES[name]
    with pytest.raises(SystemExit):
        getattr(module, function)(arguments)
    assert said in " ".join(capsys.readouterr().err.split())
