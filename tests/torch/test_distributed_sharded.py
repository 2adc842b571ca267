"""FSDP2, with two processes started by torchrun."""

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
    pytest.mark.skipif(not SHARDS_ON_CPUS, reason="torch 2.6 has no FSDP2 on CPUs"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch(CASES / "fsdp.py", tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return launch(CASES / "fsdp_checkpoints.py", tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(
    "kind",
    [
        *("sam", "tensors", "single_weights", "adaptive", "estimated", "full", "unnormed"),
        *("suffix", "share"),
    ],
)
def test_with_all_samples_two_ranks_equal_one_process(results, kind):
    for found in value(results, "like_one_process"):
        assert found[kind]["gap"] < 1e-5
        assert found[kind]["norms"] < 1e-5
        assert all(found[kind]["perturbed"])


def test_there_is_one_perturbation_and_a_selection_on_each_rank(results):
    for found in value(results, "selection_on_each_rank"):
        for distance, selected, by_hand in found:
            assert distance < 1e-5
            assert selected == by_hand


def test_weights_are_restored_bit_for_bit_and_used_by_forwards(results):
    for found in value(results, "weights_come_back"):
        assert all(found["intact"]) and all(found["seen"])


def test_gradients_add_up(results):
    assert max(value(results, "accumulation")) < 1e-6


@pytest.mark.parametrize("outside", ["first", "last", "root"])
def test_parameters_outside_the_optimizer_get_the_descent_gradient(results, outside):
    assert max(found[outside] for found in value(results, "outside_the_optimizer")) < 1e-6


@pytest.mark.parametrize("base", ["AdamW", "SGD"])
@pytest.mark.parametrize("options", ["tensors", "suffix"])
def test_a_run_from_a_distributed_checkpoint_resumes_bit_for_bit(checkpoints, base, options):
    wanted = {"count": 4, "steps": True, "config": True, "weights": True}
    assert all(found[f"{base}, {options}"] == wanted for found in value(checkpoints, "checkpoints"))


def test_a_whole_state_is_sent_by_rank_0(checkpoints):
    wanted = {"count": 3, "steps": True, "weights": True}
    assert all(found == wanted for found in value(checkpoints, "whole_checkpoints"))


@pytest.mark.parametrize("kind", ["sharded", "whole", "sent"])
def test_torchs_own_functions_keep_esams_entry(checkpoints, kind):
    for rank, found in enumerate(value(checkpoints, "states_of_torch")):
        found = dict(found[kind])
        bare, previous = found.pop("bare"), found.pop("previous")
        (replaced,) = found.pop("warnings")
        assert "replace those given in code: " in replaced and "seed=7 (in code 0)" in replaced
        assert "does not load the groups' `esam_...` options" in replaced
        options = [{"esam_rho": 0.3}, {"esam_perturb": False}]
        wanted = {"count": 3, "config": True, "options": options, "momentum": True}
        assert found == wanted, rank
        (warning,), config = previous
        assert "does not contain the direction of `ascend=Previous()`" in warning and config
        message, *kept = bare
        assert "does not contain ESAM's count, seed and hyperparameters" in message
        assert ("Missing key" in message) == (kind == "sharded")
        assert kept == [0, [{"esam_rho": 0.7}, {}]]


@pytest.mark.parametrize("options", ["sam", "top increase"])
def test_leaves_outside_the_model_get_the_descent_gradient(results, options):
    for found in value(results, "leaves_outside_the_model"):
        distance, size, hooks = found[options]
        assert distance < 1e-5 < size and hooks == 4


def test_layers_drop_their_gathered_weights_after_each_forward(results):
    assert all(len(found) >= 18 and all(found) for found in value(results, "gathered_weights"))


def test_a_nonfinite_loss_on_one_rank_affects_both(results):
    first, second = value(results, "nonfinite")
    assert first == second
    assert first["propagate"]["outcome"] == ["done", "seen", "done", "done"]
    assert first["skip"]["outcome"] == ["done", "skipped", "done", "done"]
    assert first["raise"]["outcome"] == ["done", "raised", "done", "done"]
    assert all(all(mode["intact"]) for mode in first.values())


def test_after_an_error_on_all_ranks_training_continues(results):
    for found in value(results, "fault"):
        assert all(found["intact"]) and found["same"]


def test_unsupported_uses_are_refused(results):
    for sync, first_fsdp, loop in value(results, "refusals"):
        assert "set_requires_gradient_sync(False)" in sync
        assert "fully_shard" in first_fsdp
        assert "fit trains replicas" in loop


def test_replicated_shards_and_other_precisions(results):
    for found in value(results, "meshes_and_precision"):
        assert max(found["replicas"], found["both"], found["kept"]) < 1e-5
        assert 0 < found["bfloat16"] < 0.05 and found["loss"] == found["loss"]


def test_checkpointed_and_compiled_layers_are_trained_as_plain_ones(tmp_path):
    for found in value(launch(CASES / "fsdp_layers.py", tmp_path), "layers"):
        assert len(found) == 8
        for name, (same, told) in found.items():
            assert same, name
            assert told == [], name
