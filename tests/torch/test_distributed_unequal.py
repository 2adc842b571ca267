"""Ranks whose batches differ so much that only one of them leaves samples out."""

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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch(CASES / "unequal_batches.py", tmp_path_factory.mktemp("unequal"))


@pytest.mark.skipif(not SHARDS_ON_CPUS, reason="torch 2.6 has no FSDP2 on CPUs")
def test_sharded_models_run_the_same_passes_on_all_ranks(results):
    for found in value(results, "sharded"):
        assert len(found) == 8
        for name, gaps in found.items():
            assert max(gaps) < 1e-5, name


def test_so_do_models_with_synchronised_statistics(results):
    first, second = value(results, "synchronised")
    assert len(first) == 8
    assert first == second
