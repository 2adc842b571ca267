"""Parameters that are replaced between steps: the optimizer has the old ones."""

import pytest
from tests.torch.refusals import make
from tests.torch.scene import batch, losses_of
from torch import nn

from esam_core import ESAMValueError


def assign_all(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def replace_one(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


@pytest.mark.parametrize("replace", [assign_all, replace_one])
@pytest.mark.parametrize("steps", [0, 1])
def test_is_an_error(replace, steps):
    model, optimizer = make()
    for _ in range(steps):
        optimizer.step(losses_of(model), *batch())
    replace(model)
    with pytest.raises(ESAMValueError, match=r"only parameters of `model`.*create the optimizer"):
        optimizer.step(losses_of(model), *batch())


def test_is_no_error_if_the_values_are_copied():
    model, optimizer = make()
    optimizer.step(losses_of(model), *batch())
    model.load_state_dict(model.state_dict())
    optimizer.step(losses_of(model), *batch())
    assert optimizer.count == 2


class Irreps(tuple):
    """A tuple without a length, as e3nn's."""

    __slots__ = ()

    def __len__(self):
        raise NotImplementedError


def test_attributes_that_forbid_their_length_are_left_alone():
    model, optimizer = make()
    model.irreps = Irreps((1, 2))
    for _ in range(2):
        optimizer.step(losses_of(model), *batch())
    assert optimizer.count == 2 and isinstance(model.irreps, Irreps)
    assert [part for part in model.irreps] == [1, 2]  # noqa: C416 - a list asks for the length
