"""The file of finished runs: one complete line per run, despite parallel writes and kills."""

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from benchmarks.run import Run
from benchmarks.store import Store, key_of

RUN = Run(method="sam", data="digits", model="resnet8")

#: A different value for each option of a run.
OTHER: dict[str, Any] = {
    "method": "sgd",
    "data": "cifar10",
    "model": "resnet18",
    "optimizer": "adamw",
    "device": "cuda",
    "width": 3,
    "m": 5,
    "sharp_weight_decay": 0.1,
    "images": 7,
    "classes": 4,
    "size": 8,
}


def _record(run: Run, final: float = 1.0) -> dict[str, Any]:
    return {"run": dataclasses.asdict(run), "probe": None, "final": final}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(Run)])
def test_every_option_is_part_of_the_key(option: str) -> None:
    value = getattr(RUN, option)
    if option in OTHER:
        other = OTHER[option]
    elif isinstance(value, bool):
        other = not value
    else:
        other = value + 1
    assert dataclasses.replace(RUN, **{option: other}).key() != RUN.key()


def test_the_probe_is_part_of_the_key_and_an_option_that_is_not_named_has_its_default() -> None:
    record = _record(RUN)
    assert key_of(record) == RUN.key()
    assert key_of({**record, "probe": {"name": "fit"}}) == RUN.key({"name": "fit"}) != RUN.key()
    del record["run"]["ema"]
    assert key_of(record) == RUN.key()


def test_a_run_has_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.records() == []
    assert store.add(_record(RUN))
    assert not store.add(_record(RUN, final=2.0))
    assert store.add(_record(dataclasses.replace(RUN, seed=1)))
    assert [r["run"]["seed"] for r in store.records()] == [0, 1]
    assert store.find(RUN) == _record(RUN)
    assert store.find(dataclasses.replace(RUN, seed=2)) is None


def test_incomplete_lines_are_not_read_and_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(_record(RUN))
    whole = store.path.read_bytes()
    half = json.dumps(_record(dataclasses.replace(RUN, seed=1))).encode()[:-9]
    store.path.write_bytes(whole + half)
    assert store.records() == [_record(RUN)]
    other = _record(dataclasses.replace(RUN, seed=2))
    store.add(other)
    assert store.records() == [_record(RUN), other]
    assert half not in store.path.read_bytes()


def _add_many(folder: Path, barrier: Any) -> None:
    barrier.wait()
    for seed in range(40):
        Store(folder).add(_record(dataclasses.replace(RUN, seed=seed)))


def test_two_processes_that_add_the_same_runs_write_each_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=_add_many, args=(tmp_path, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert sorted(r["run"]["seed"] for r in Store(tmp_path).records()) == list(range(40))
