"""Accelerate, Fabric, Lightning and Hugging Face's Trainer on two ranks."""

import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parent / "distributed_cases"
sys.path.insert(0, str(CASES))

from launch import SHARDS_ON_CPUS, launch, value  # noqa: E402


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    for name in ("accelerate", "transformers", "lightning"):
        pytest.importorskip(name)
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed")
    # One start for all cases: most of the time is spent on imports.
    results = launch(CASES / "integrations.py", tmp_path_factory.mktemp("ranks"))

    def case(name):
        first, second = value(results, name)
        assert first == second  # the weights' bits, on both ranks
        return first

    return case


@pytest.mark.slow
def test_ranks_train_the_same_model_in_accelerate_fabric_and_trainer(ranks):
    assert [found[1:] for found in ranks("accelerate")] == 4 * [[True, True]]
    assert ranks("fabric")[1:] == [True, True]
    assert ranks("trainer")[1]


@pytest.mark.slow
@pytest.mark.skipif(not SHARDS_ON_CPUS, reason="torch 2.6 has no FSDP2 on CPUs")
def test_accelerate_resumes_a_sharded_run(ranks):
    assert ranks("accelerate_shards") == 2 * [[3, True]]


@pytest.mark.slow
def test_ranks_train_the_same_model_in_lightning(ranks):
    assert ranks("lightning")[1:] == [True, [False] * 4, True]
    # NaN on only one rank: both skip the batch, or both raise.
    _, finite, skipped, _ = ranks("lightning_skips")
    assert finite and sum(skipped) == 1
    name, _ = ranks("lightning_raises")
    assert name == "NonFiniteError"


@pytest.mark.slow
def test_ranks_find_unused_parameters_in_lightning(ranks):
    *unused, none, plain = ranks("lightning_with_unused_parameters")
    assert all(found[1:] == [True, [False] * 4, True] for found in unused)
    assert none == plain and plain[3]
