"""The conformance kit on esam-keras: all checks uncompiled, and some compiled."""

import pytest

from esam_core import Part, TopLoss
from esam_core.conformance.problems import batchnorm
from esam_core.conformance.testing import conformance
from esam_core.conformance.trace import Run, follow
from esam_keras.conformance import KerasAdapter, adapter

#: Checks that compilation could affect: masks, samples and numbers.
COMPILED = (
    "check_rho_zero_is_the_base_optimizer",
    "check_everything_is_sam",
    "check_each_step_has_its_own_mask",
    "check_perturbation_follows_the_mask",
    "check_random_suffix",
    "check_schedules",
    "check_norm_modes",
    "check_largest_increases_are_selected",
    "check_ties_go_to_the_lower_index",
    "check_proportional_selection",
    "check_running_statistics_are_updated_once",
    "check_one_selected_sample_with_batchnorm",
    "check_descent_pass_sees_the_same_noise",
    "check_passes_read_the_same",
    "check_overflow_at_the_peak",
    "check_nonfinite_steps_are_skipped",
    "check_a_skipped_step_writes_nothing",
    "check_resuming",
    "check_climb_along_a_part",
    "check_statistics_with_a_part",
    "check_climb_along_the_previous_gradient",
    "check_climb_along_the_momentum",
    "check_nonfinite_steps_with_any_direction",
)


@conformance(adapter)
def test_uncompiled(run):
    run()


@pytest.mark.backends("tensorflow", "jax")
@conformance(KerasAdapter(run_eagerly=False))
def test_compiled(run, request):
    if not any(f"[{name}]" in request.node.name for name in COMPILED):
        pytest.skip("compilation does not affect it")
    run()


def test_one_sample_outside_the_part_uses_running_statistics():
    esam = {"rho": 0.2, "beta": 1.0, "select": TopLoss(0.5), "ascend": Part(0.875)}
    follow(adapter, Run(problem=batchnorm(), esam=esam), steps=2)


def test_gaps_are_declared():
    assert set(adapter.gaps) == {"backward", "groups"}
