"""`fit` under torchrun: two processes."""

import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parent / "distributed_cases"
sys.path.insert(0, str(CASES))

from launch import launch  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def results(folder):
    return launch(CASES / "fitting.py", folder)


@pytest.mark.parametrize("kind", ["esam", "sgd"])
def test_ranks_train_one_model_and_measure_it_together(results, kind):
    first, second = (found[kind] for found in results)
    assert first["bits"] == second["bits"]
    assert first["rows"] == second["rows"]
    last = first["rows"][-1]
    # 31 samples on two ranks: each counts once.
    assert last["eval_loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert last["eval_accuracy"] == pytest.approx(first["accuracy"])
    assert last["train_loss"] < first["rows"][0]["train_loss"]
    assert ("sharpness" in last) == (kind == "esam")
    assert not first["wrapped"]  # the optimizer's own model is restored


def test_a_run_of_two_ranks_resumes_exactly(results):
    for found in results:
        assert found["resumed"]["bits"] == found["esam"]["bits"]
        assert found["resumed"]["rows"] == found["esam"]["rows"]


def test_the_order_of_the_samples_is_drawn_from_the_seed(results):
    """Rank 0 draws it: a generator seeded per rank gave overlapping shares."""
    for first, second in zip(*(found["orders"] for found in results), strict=True):
        assert sorted(first + second) == list(range(16))
    one, two, again, *_ = results[0]["orders"]
    assert one != two == again


def test_a_loader_of_an_iterable_data_set_is_refused(results):
    """Every rank trained on all samples; an iterable that is no DataLoader is its own share."""
    for rank, (refused, numbers) in enumerate(found["iterable"] for found in results):
        assert "Received: one of Stream, with which every rank would train on all" in refused
        assert numbers == list(range(rank, 8, 2))


def test_an_evaluation_of_fewer_samples_than_ranks(results):
    for loss, error, wanted in (found["tiny"] for found in results):
        assert loss == pytest.approx(wanted)
        assert error.startswith("The evaluation loader must yield a batch")


def test_only_rank_0_writes(results, folder):
    last = torch.load(folder / "esam" / "last.pt", weights_only=True)
    assert len(last["ranks"]) == len(results) == 2
    assert not any(name.startswith("module.") for name in last["model"])


def test_ranks_reduce_gradients_once_per_update(results):
    assert [found["reduced"][0] for found in results] == [2, 2]
    assert results[0]["reduced"] == results[1]["reduced"]


@pytest.mark.parametrize("place", ["first", "last"])
def test_ranks_stay_equal_if_an_accumulated_batch_is_skipped(results, place):
    first, second = (found[f"skipped {place}"] for found in results)
    assert first == second
    assert first[1] != results[0]["reduced"][1]


def test_an_epoch_is_kept_if_on_epoch_ends_training(results):
    for rank, found in enumerate(results):
        assert found["ended by all"] == ["StopIteration", "", 3, 2]
        kind, text, *saved = found["ended by one"]
        assert saved == [3, 2]
        assert kind == ("StopIteration" if rank == 1 else "ESAMRuntimeError")
        if rank == 0:
            assert "Received: an exception in 1 of 2 processes" in text


def test_a_folder_that_ranks_do_not_share_is_refused_by_all(results):
    for found in results:
        assert found["not shared"].startswith("`folder` must be on a disk that all processes can")
        assert "in which 1 of 2 processes find last.pt" in found["not shared"]


def test_a_base_optimizer_sharded_over_the_ranks_resumes_exactly(results):
    (whole, resumed), other = (found["sharded base"] for found in results)
    assert whole == resumed
    assert [whole, resumed] == other
