"""Steps that must be refused without changing anything."""

import pytest
import torch
from tests.torch.scene import Snapshot, net, sgd

from esam_core import ESAMValueError
from esam_torch import ESAM


def make(model=None, **kwargs):
    model = net() if model is None else model
    return model, ESAM(sgd(model), model, **{"rho": 0.1, "beta": 0.6, "gamma": 0.5, **kwargs})


def refuses(optimizer, losses, *args, error=ESAMValueError, match, **kwargs):
    """Require that `backward` raises and changes nothing, including existing gradients."""
    model = optimizer.model
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.25 * i)
    before, count = Snapshot(model, optimizer), optimizer.count
    with pytest.raises(error, match=match):
        optimizer.backward(losses, *args, **kwargs)
    before.check()
    assert optimizer.count == count
