"""Invalid arguments of `ESAM` and of parameter groups: a clear error."""

import re

import pytest
import torch
from tests.torch.refusals import make, refuses
from tests.torch.scene import Snapshot, batch, losses_of, net, sgd
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch import ESAM, Everything, SideBySide, TopLoss


def test_base_is_a_class():
    model = net()
    with pytest.raises(ESAMTypeError, match=r"not a class: ESAM\(SGD\(model.parameters\(\)"):
        ESAM(torch.optim.SGD, model)


def test_base_is_not_an_optimizer():
    with pytest.raises(ESAMTypeError, match=r"must be a torch.optim.Optimizer, .* Received: float"):
        ESAM(0.1, net())


def test_base_is_an_esam():
    model, optimizer = make()
    with pytest.raises(ESAMTypeError, match=r"another ESAM"):
        ESAM(optimizer, model)


def test_base_has_foreign_parameters():
    model, other = net(), net(1)
    base = torch.optim.SGD([*model.parameters(), other.head.weight], lr=0.1)
    with pytest.raises(
        ESAMValueError, match=r"only parameters of `model`.*1 not in the model.*\(3, 6\)"
    ):
        ESAM(base, model)


def test_model_is_not_a_module():
    model = net()
    with pytest.raises(ESAMTypeError, match=r"`model` must be a torch.nn.Module"):
        ESAM(sgd(model), model.forward)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rho": -0.1}, ESAMValueError, re.escape("`rho` must be finite and >= 0. Received: rho=")),
        ({"gamma": 1.5}, ESAMValueError, re.escape("`gamma` must be in (0, 1]. Received: gamma=")),
        ({"beta": 0.5, "perturb": Everything()}, ESAMValueError, "`beta` is short for"),
        ({"gamma": 0.5, "select": TopLoss()}, ESAMValueError, "`gamma` is short for"),
        ({"roh": 0.1}, TypeError, "roh"),
        ({"scaler": torch.amp.GradScaler("cpu")}, TypeError, "scaler"),
        ({"blocks": []}, ESAMValueError, "`blocks` must not be empty"),
    ],
)
def test_hyperparameters(arguments, error, match):
    model = net()
    before = Snapshot(model)
    with pytest.raises(error, match=match):
        ESAM(sgd(model), model, **arguments).step(losses_of(model), *batch())
    before.check(but=("gradients",))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"esam_rho": -1.0}, ESAMValueError, "`esam_rho` must be finite and >= 0"),
        ({"esam_rho": torch.tensor(0.1)}, ESAMTypeError, "`esam_rho` must be a finite number"),
        ({"esam_adaptive": 1}, ESAMTypeError, "`esam_adaptive` must be True or False"),
        ({"esam_roh": 0.1}, ESAMTypeError, "`esam_roh` is not an option.*esam_rho"),
    ],
)
def test_options_of_a_group(options, error, match):
    model = net()
    groups = [{"params": [model.head.weight], **options}]
    with pytest.raises(error, match=match):
        ESAM(torch.optim.SGD(groups, lr=0.1), model)
    optimizer = ESAM(torch.optim.SGD([model.head.bias], lr=0.1), model)
    with pytest.raises(error, match=match):
        optimizer.add_param_group(groups[0])
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    refuses(optimizer, losses_of(model), *batch(), error=error, match=match)


def test_a_group_of_foreign_parameters():
    model, optimizer = make()
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMValueError, match=r"only parameters of `model`"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    before.check()


def test_a_parameter_in_two_groups_is_refused_by_torch():
    model, optimizer = make()
    with pytest.raises(ValueError, match=r"more than one parameter group"):
        optimizer.add_param_group({"params": [model.head.weight]})


def test_side_by_side():
    model = net()
    one, two = sgd(model), torch.optim.Adam([model.head.weight])
    with pytest.raises(ESAMValueError, match=r"two or more optimizers. Received: 1"):
        SideBySide(one)
    with pytest.raises(ESAMValueError, match=r"no parameter in common. Received: 1"):
        SideBySide(one, two)
    with pytest.raises(ESAMTypeError, match=r"not a class"):
        SideBySide(one, torch.optim.Adam)


def test_maximize_is_refused():
    model = net()
    with pytest.raises(ESAMValueError, match="`maximize` must be False"):
        ESAM(sgd(model, maximize=True), model)


def test_a_lazy_module_that_has_not_been_called():
    model = nn.Sequential(nn.LazyLinear(3))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ESAMValueError, match=r"call it once.*Received: 0\.weight"):
        ESAM(base, model)
    model(torch.ones(2, 4))
    ESAM(base, model)


def test_a_model_that_collects_per_sample_gradients():
    # As Opacus's GradSampleModule marks the parameters of its model.
    model = net()
    model.head.weight.grad_sample = None
    with pytest.raises(ESAMTypeError, match=r"must not collect per-sample.*head.weight with"):
        ESAM(sgd(model), model)


def test_a_group_that_collects_per_sample_gradients_is_not_added():
    model = net()
    optimizer = ESAM(torch.optim.SGD(model.conv.parameters(), lr=0.1), model)
    model.head.weight.grad_sample = None
    with pytest.raises(ESAMTypeError, match=r"must not collect per-sample.*head.weight with"):
        optimizer.add_param_group({"params": list(model.head.parameters())})
    assert len(optimizer.param_groups) == 1


def test_a_model_that_collects_them_later():
    model, optimizer = make()
    before = Snapshot(model)
    model.head.weight.grad_sample = None
    with pytest.raises(ESAMTypeError, match=r"must not collect per-sample.*head.weight with"):
        optimizer.loss(losses_of(model), *batch())
    before.check()
