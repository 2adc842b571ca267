"""Directions on two ranks: under DistributedDataParallel and under FSDP2."""

import itertools
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

#: For cases that need FSDP2, and those that the ranks run after them.
needs_shards = pytest.mark.skipif(not SHARDS_ON_CPUS, reason="torch 2.6 has no FSDP2 on CPUs")

SOURCES = ("part", "previous", "momentum")
KINDS = ("all samples", "top increase", "suffix")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch(CASES / "directions.py", tmp_path_factory.mktemp("directions"))


@pytest.mark.parametrize(
    "case", [", ".join(map(str, c)) for c in itertools.product(SOURCES, KINDS, (False, True))]
)
def test_replicas_are_equal_and_average_the_ranks_gradients(results, case):
    first, second = (found[case] for found in value(results, "replicas"))
    assert first["bits"] == second["bits"]
    assert max(first["gap"], second["gap"]) < 1e-5
    assert first["reductions"] == second["reductions"] == 1
    assert first["parts"] == second["parts"]  # positions in each rank's own batch
    # The next direction is the same on both ranks: one rank's checkpoint resumes both.
    assert first["direction"] == second["direction"]
    assert bool(first["direction"]) == case.startswith("previous")


@pytest.mark.parametrize("source", SOURCES)
def test_accumulation_under_no_sync_reduces_once_per_update(results, source):
    first, second = (found[source] for found in value(results, "accumulation"))
    assert first == second
    assert first["reductions"] == 3


@needs_shards
@pytest.mark.parametrize("source", SOURCES)
def test_sharded_weights_have_one_perturbation(results, source):
    for found in value(results, "sharded"):
        assert found[source]["gap"] < 1e-5
        assert all(found[source]["intact"])


@needs_shards
@pytest.mark.parametrize("kind", ["sharded", "replicas"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_saved_by_distributed_checkpoint_resumes_bit_for_bit(results, source, kind):
    for found in value(results, "checkpoints"):
        assert found[f"{source}, {kind}"] == {"same": True, "count": 6}


def test_the_base_optimizers_state_may_be_distributed_unless_a_step_needs_it(results):
    for found in value(results, "distributed_moments"):
        assert found["part"] and found["previous"]
        assert "needs the first moments of all parameters" in found["momentum"]
        assert "Received: ZeroRedundancyOptimizer" in found["momentum"]
