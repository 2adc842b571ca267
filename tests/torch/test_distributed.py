"""DistributedDataParallel, with two processes started by torchrun."""

import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parent / "distributed_cases"
sys.path.insert(0, str(CASES))

from launch import launch, value  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch(CASES / "ddp.py", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("kind", ["esam", "sam", "suffix", "suffix_all", "interval", "full"])
def test_replicas_are_equal_and_average_the_ranks_gradients(results, kind):
    first, second = (found[kind] for found in value(results, "many_steps"))
    assert first["bits"] == second["bits"]
    assert max(first["gap"], second["gap"]) < 1e-5
    # Each rank selects among its own samples.
    assert first["indices"] != second["indices"] or not first["indices"]


@pytest.mark.parametrize("kind", ["esam", "sam", "suffix", "suffix_all", "interval", "full"])
def test_gradients_are_reduced_once_per_step(results, kind):
    for found in value(results, "many_steps"):
        assert found[kind]["reductions"] == 1


def test_uneven_batches_select_different_numbers_of_samples(results):
    first, second = value(results, "uneven_batches")
    assert [case["selected"] for case in first] == [4, 4, 1]
    assert [case["selected"] for case in second] == [3, 1, 5]
    for mine, theirs in zip(first, second, strict=True):
        assert mine["bits"] == theirs["bits"] and mine["reductions"] == 1
        assert mine["gap"] is None or mine["gap"] < 1e-5


def test_a_nonfinite_loss_on_one_rank_affects_both(results):
    first, second = value(results, "nonfinite")
    assert first == second
    assert first["propagate"]["finite"] == [True, False, True, True]
    assert first["skip"]["skipped"] == [False, True, False, False]
    assert first["raise"]["raised"] == [False, True, False, False]
    assert all(all(mode["intact"]) for mode in first.values())


def test_accumulation_under_no_sync_reduces_once_per_update(results):
    first, second = value(results, "accumulation")
    assert first == second
    assert first["reductions"] == 3 and first["distance"] < 1e-6
    # Not finite on one rank, without a reduction in that pass: both ranks still skip it.
    assert first["skipped"] == [False, False, False, False, True, False]


def test_ranks_with_fewer_batches_join(results):
    first, second = value(results, "join")
    assert first["bits"] == second["bits"]
    assert (first["count"], second["count"]) == (3, 5)


def test_after_an_error_on_all_ranks_training_continues(results):
    first, second = value(results, "fault")
    assert first == second
    assert first["intact"] and first["passes"] == [8, 8, 4]


@pytest.mark.parametrize("option", ["views", "buckets", "no_buffers", "compiled"])
def test_options_of_ddp_change_nothing(results, option):
    first, second = (found[option] for found in value(results, "options_of_ddp"))
    assert first == second
    assert first["gap"] < 1e-6 and first["reductions"] == 1


def test_a_static_graph_is_refused(results):
    for found in value(results, "options_of_ddp"):
        assert "static_graph=True" in found["static"]


def test_unused_parameters_under_find_unused_parameters(results):
    first, second = (found["unused"] for found in value(results, "options_of_ddp"))
    assert first["bits"] == second["bits"] and first["gap"] < 1e-6


@pytest.mark.parametrize("kind", ["esam", "sam"])
def test_losses_under_no_sync_and_find_unused_parameters(results, kind):
    first, second = (found[kind] for found in value(results, "losses"))
    assert first == second  # bit for bit
    assert first["reductions"] == 4 and first["count"] == 8  # one reduction per update
    assert first["distance"] < 1e-6 and first["spare"]


def test_statistics_are_updated_once_per_step(results):
    assert [found["batches"] for found in value(results, "buffers")] == [4, 4]


def test_one_selected_sample_keeps_synchronised_statistics(results):
    """Another rank with more selected samples would wait for this rank's statistics."""
    for found in value(results, "synchronised_statistics"):
        assert found == ["BatchNorm1d"]
