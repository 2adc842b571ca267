"""One loss for several samples: a warning, since no samples can be selected."""

import re
import warnings

import pytest
import torch
from tests.torch.scene import sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Batch, Part, Previous, Whole

TOLD = re.compile(r"returned one loss for a batch whose tensors have at least 8 rows.* saves noth")


def steps(losses, *batch, count=3, **options):
    """Return the texts of the warnings of some steps."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = ESAM(sgd(model), model, rho=0.1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.backward(lambda *batch: losses(model, *batch), *batch)
            optimizer.step()
            optimizer.zero_grad()
    return [str(warning.message) for warning in caught]


def mean_of_all(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)[None]


INPUTS, TARGETS = torch.randn(8, 4), torch.arange(8) % 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gamma": 0.5}, "gamma=0.5"),
        ({"gamma": 1.0, "ascend": Part(0.25)}, "ascend=Part(share=0.25)"),
        ({"gamma": 0.5, "ascend": Part(0.25)}, "gamma=0.5 and ascend=Part(share=0.25)"),
        ({"gamma": 0.5, "ascend": Previous()}, "gamma=0.5"),
    ],
)
def test_is_warned_about_once(options, named):
    (found,) = steps(mean_of_all, INPUTS, TARGETS, **options)
    assert TOLD.search(found)
    assert f"and {named} saves" in found


@pytest.mark.parametrize("ascend", [Batch(), Part(1.0), Previous()])
def test_is_right_if_no_samples_are_selected(ascend):
    assert steps(mean_of_all, INPUTS, TARGETS, gamma=1.0, ascend=ascend) == []


def test_is_right_for_a_batch_of_one_sample():
    assert steps(mean_of_all, INPUTS[:1], TARGETS[:1], gamma=0.5) == []


def test_is_right_for_a_batch_without_tensors():
    assert steps(lambda model: model(INPUTS).square().mean()[None], gamma=0.5) == []


def test_is_right_if_the_tensors_are_not_samples():
    assert steps(mean_of_all, Whole(INPUTS), Whole(TARGETS), gamma=0.5) == []


def test_a_number_is_an_error_with_both_ways_out():
    with pytest.raises(ValueError, match=r"one loss per sample.*loss\.expand\(b\), and use gamma"):
        steps(lambda *batch: mean_of_all(*batch)[0], INPUTS, TARGETS, gamma=0.5)
