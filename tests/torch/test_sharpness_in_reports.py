"""When a report has a sharpness: the cases that docs/torch.md lists."""

import pytest
import torch
from tests.torch.scene import batch, losses_of, net, sgd

from esam_torch import (
    ESAM,
    All,
    Bernoulli,
    Between,
    Every,
    Everything,
    Momentum,
    Part,
    Previous,
    Proportional,
    Random,
    Sometimes,
    Suffix,
    TopLoss,
)


def second_report(b=8, groups=None, bad=False, **options):
    """Return the report of the second step, which has a direction from the first."""
    model = net()
    base = sgd(model)
    base.param_groups[0].update(groups or {})
    optimizer = ESAM(base, model, **{"perturb": Everything(), **options})
    for seed, size in ((1, 8), (2, b)):
        inputs, targets = batch(size, seed=seed)
        if bad and seed == 2:
            inputs[0] = torch.nan
        optimizer.step(losses_of(model), inputs, targets)
    return optimizer.report


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ascend": Part(0.25)},
        {"ascend": Previous()},
        {"ascend": Momentum()},
        {"select": Proportional(0.5, score="increase")},
        {"b": 2},
        {"gamma": 0.9, "b": 10},
    ],
    ids=str,
)
def test_a_selection_by_the_increase_computes_the_sharpness(options):
    report = second_report(**options)
    assert torch.isfinite(report.sharpness) and report.perturbed


@pytest.mark.parametrize(
    "options",
    [
        # all samples are selected
        {"gamma": 1.0},
        {"select": All(), "ascend": Part(0.25)},
        {"gamma": 1.0, "ascend": Previous()},
        {"gamma": 1.0, "ascend": Momentum()},
        {"b": 1},
        {"gamma": 0.9, "b": 9},
        # selectors that do not use the increase
        {"select": Random(0.5)},
        {"select": TopLoss(0.5)},
        {"select": Proportional(0.5)},
        {"select": TopLoss(0.5), "ascend": Part(0.25)},
        # nothing is perturbed
        {"rho": 0.0},
        {"groups": {"esam_rho": 0.0}},
        {"groups": {"esam_perturb": False}},
        {"perturb": Every(2)},
        {"perturb": Between(5, 9)},
        {"perturb": Sometimes(1e-5)},
        {"perturb": Bernoulli(1e-5)},
        # skipped
        {"bad": True, "on_nonfinite": "skip"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:No weights are trained and may be perturbed")
def test_all_other_steps_have_none(options):
    report = second_report(**options)
    assert report.sharpness is None
    assert report.skipped or torch.isfinite(report.loss)


@pytest.mark.parametrize("ascend", [Previous(), Momentum()], ids=str)
def test_the_first_step_along_an_earlier_direction_has_none(ascend):
    model = net()
    optimizer = ESAM(sgd(model), model, perturb=Suffix(0.5), ascend=ascend)
    assert optimizer.step(losses_of(model), *batch()).sharpness is None
    assert optimizer.step(losses_of(model), *batch()).sharpness is not None
