"""Tensor parallelism, alone and with FSDP2, with four processes started by torchrun."""

import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parent / "distributed_cases"
sys.path.insert(0, str(CASES))

from launch import SHARDS_ON_CPUS, launch, value  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
]

KINDS = ["columns and rows", "sequences", *(["with FSDP2"] if SHARDS_ON_CPUS else [])]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    return launch(CASES / "tensor_parallel.py", folder, processes=4, timeout=600)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        *("sam", "paper", "single_weights", "adaptive", "estimated", "full"),
        *("suffix", "proportional", "random", "previous", "momentum"),
    ],
)
def test_steps_equal_those_of_one_process(results, kind, options):
    if (kind, options) == ("sequences", "momentum") and not SHARDS_ON_CPUS:
        pytest.skip("torch 2.6 adds partial sums to momenta wrongly")
    for found in value(results, "like_one_process"):
        seen = found[f"{kind}, {options}"]
        assert seen["gap"] < 1e-6 and seen["norms"] < 1e-6
        assert seen["intact"] and seen["chosen"]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_a_batch_select_the_same_samples(results, kind):
    by_rank = [(rank, found[kind]) for rank, found in value(results, "samples")]
    of_each = [[found for rank, found in by_rank if rank == data] for data in (0, 1)]
    assert all(first == second for first, second in of_each)
    assert of_each[0][0] != of_each[1][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_a_checkpoint_resumes_bit_for_bit(results, kind):
    assert all(found[kind] == [6, True] for found in value(results, "checkpoints"))


def test_losses_may_be_distributed(results):
    assert max(max(found) for found in value(results, "losses_of_several_ranks")) < 1e-6


def test_distributed_batches_and_fit_are_refused(results):
    for batch, loop, intact in value(results, "refusals"):
        assert "`batch[0]`" in batch and "DTensor" in batch and "take=function" in batch
        assert "fit trains replicas" in loop and "tensor parallelism" in loop
        assert intact


def test_all_ranks_must_agree_that_a_step_is_finite(results):
    assert all(found == [True, False] for found in value(results, "agreement"))


def test_distributed_buffers_change_once_in_a_step(results):
    for found in value(results, "buffers"):
        for gap, calls, kept in found:
            assert gap < 1e-6 and calls == 3.0 and kept


def test_frozen_layers_are_split_too(results):
    first, second, third, fourth = value(results, "frozen_layers")
    assert len(first) == 4 and first == second and third == fourth


def test_a_saved_direction_fits_other_layouts(results):
    assert max(max(found) for found in value(results, "other_layouts")) < 1e-6


def test_model_and_optimizer_can_be_copied(results):
    assert all(value(results, "copies"))
