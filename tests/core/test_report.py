"""The step report, checked by hand, and means that wait for the device only when read."""

import numpy as np
import pytest

from esam_core import ESAMTypeError, RunningMeans, StepReport
from esam_core.report import REPORTED_MEANS

LOSSES = np.array([1.0, 2.0, 3.0, 4.0])
PERTURBED = np.array([1.5, 4.0, 3.25, 5.0])  # increases: .5, 2, .25, 1


def report(**others):
    """Return the report of a step that selected the samples 1 and 3."""
    fields = {
        "count": 0,
        "losses": LOSSES,
        "perturbed_losses": PERTURBED,
        "indices": np.array([1, 3]),
        "sample_weights": np.array([0.5, 0.5]),
        "perturbation_norm": 0.1,
        "gradient_norm": 2.0,
        "perturbed": ("w",),
        "weight_share": 0.25,
        "sample_share": 0.5,
    }
    return StepReport(**{**fields, **others})


def test_sharpness_by_hand():
    found = report()
    assert found.loss == 2.5
    assert found.perturbed_loss == pytest.approx(13.75 / 4)
    assert found.increases.tolist() == [0.5, 2.0, 0.25, 1.0]
    assert found.sharpness == pytest.approx(3.75 / 4)
    assert found.selected_sharpness == pytest.approx(1.5)
    assert found.rejected_sharpness == pytest.approx(0.375)
    assert found.threshold == 1.0  # the second largest increase, with two selected


def test_sharpness_is_the_weighted_mean_of_both_parts():
    """R_B = gamma R_B+ + (1 - gamma) R_B-."""
    found = report()
    share = found.sample_share
    whole = share * found.selected_sharpness + (1 - share) * found.rejected_sharpness
    assert found.sharpness == pytest.approx(whole)


def test_without_a_selection_pass_there_is_no_sharpness():
    found = report(perturbed_losses=None)
    for name in ("perturbed_loss", "increases", "sharpness", "selected_sharpness", "threshold"):
        assert getattr(found, name) is None
    assert found.rejected_sharpness is None
    assert found.loss == 2.5


def test_with_everything_selected_there_is_no_threshold():
    found = report(indices=None)
    assert found.sharpness is not None
    assert found.selected_sharpness is None
    assert found.rejected_sharpness is None
    assert found.threshold is None


def test_a_base_step_reports_only_losses():
    found = StepReport(count=7, losses=LOSSES)
    assert found.perturbation_norm == 0.0
    assert found.gradient_norm is None
    assert found.perturbed == ()
    assert found.sample_share == 1.0
    assert not found.skipped


def test_running_means():
    means = RunningMeans()
    means.update(report())
    means.update(report(losses=LOSSES + 2.0, perturbed_losses=PERTURBED + 2.0))
    result = means.result()
    assert list(result) == list(REPORTED_MEANS)
    assert result["loss"] == 3.5
    assert result["selected_sharpness"] == pytest.approx(1.5)
    assert all(type(value) is float for value in result.values())


def test_steps_without_a_field_are_left_out_of_its_mean():
    means = RunningMeans(["sharpness", "loss"])
    means.update(report())
    means.update(StepReport(count=1, losses=LOSSES * 0.0))
    assert means.result() == {"sharpness": pytest.approx(3.75 / 4), "loss": 1.25}


def test_means_of_half_precision():
    """Sums in float16 stop growing at 2048, and overflow at 65504."""
    means = RunningMeans(("loss",))
    for _ in range(5000):
        means.update(StepReport(count=0, losses=np.full(2, 0.875, dtype=np.float16)))
    assert means.result() == {"loss": 0.875}


def test_skipped_steps_are_left_out():
    means = RunningMeans(("loss",))
    means.update(report())
    means.update(StepReport(count=1, losses=np.array([np.nan, 1.0]), skipped=True))
    means.update(report(losses=LOSSES + 1.0))
    assert means.result() == {"loss": 3.0}


def test_a_single_name_is_not_a_sequence_of_names():
    message = r"`fields` must be a sequence of names.* Received: fields='loss'\."
    with pytest.raises(ESAMTypeError, match=message):
        RunningMeans("loss")


def test_reset():
    means = RunningMeans(("loss",))
    means.update(report())
    means.reset()
    assert means.result() == {}
    means.update(report())
    assert means.result() == {"loss": 2.5}


class OnDevice(np.ndarray):
    """An array that must not be read."""

    def __float__(self):
        raise AssertionError("the device was waited for")

    __bool__ = __int__ = __float__


def test_updating_converts_nothing_to_a_python_number():
    means = RunningMeans()
    for _ in range(3):
        means.update(report(losses=LOSSES.view(OnDevice), gradient_norm=np.ones(()).view(OnDevice)))
    with pytest.raises(AssertionError, match="waited for"):
        means.result()


def test_a_report_is_frozen():
    with pytest.raises(AttributeError):
        report().count = 3


def test_reports_are_compared_by_identity():
    report = StepReport(count=0, losses=np.ones(3))
    assert report == report and report != StepReport(count=0, losses=np.ones(3))
    assert len({report}) == 1
