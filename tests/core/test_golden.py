"""The recorded traces come from the reference, and contain their provenance."""

import json
from importlib import resources

import numpy as np
import pytest

from esam_core.conformance import golden
from esam_core.conformance.compare import close_all
from esam_core.conformance.golden import __main__ as recorder
from esam_core.conformance.numpy_adapter import NumpyAdapter
from esam_core.problem import Conventions

RUNS = golden.RUNS | golden.DIRECTION_RUNS


@pytest.mark.parametrize("name", RUNS)
def test_the_reference_reproduces_the_recording(name):
    recorded, now = golden.load()["traces"][name], golden.record(RUNS[name])
    assert len(recorded) == len(now) == golden.STEPS
    for old, new in zip(recorded, now, strict=True):
        assert old.keys() == new.keys()
        for key in ("perturbed", "part", "indices", "passes"):
            assert old[key] == new[key]
        for key in ("weights", "means"):
            close_all(
                key,
                {n: np.asarray(a) for n, a in new[key].items()},
                {n: np.asarray(a) for n, a in old[key].items()},
                kind="weights",  # another libm rounds exp and tanh differently
                dtype="float64",
            )


def test_the_file_and_the_runs_have_the_same_names():
    assert list(golden.load()["traces"]) == list(RUNS)


def test_provenance():
    provenance = golden.load()["provenance"]
    assert set(provenance) == {"command", "esam-core", "numpy", "python", "date"}
    assert provenance["command"] == "python -m esam_core.conformance.golden"


def test_nothing_recorded_depends_on_the_conventions_of_frameworks():
    keras = NumpyAdapter(Conventions(False, True, False))
    for run in RUNS.values():
        ours, theirs = run.on(NumpyAdapter(), "float64"), run.on(keras, "float64")
        for batch in run.problem.batches:
            ours.step(batch)
            theirs.step(batch)
        close_all("weights", theirs.weights(), ours.weights(), kind="weights", dtype="float64")


def test_the_command_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "PATH", tmp_path / "traces.json")
    recorder.main()
    written = json.loads((tmp_path / "traces.json").read_text())
    assert written["traces"].keys() == RUNS.keys()


def test_the_file_is_in_the_package():
    assert resources.files("esam_core.conformance.golden").joinpath("traces.json").is_file()
