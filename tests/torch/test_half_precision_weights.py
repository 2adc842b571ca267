"""Weights in half precision."""

import warnings

import pytest
import torch
from tests.torch.devices import devices, on
from tests.torch.scene import losses_of, net, same
from torch import nn

from esam_torch import ESAM, Everything


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_warn_once_with_the_measured_share(dtype, device):
    model = net(dropout=0.0).to(device, dtype)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.02, perturb=Everything()
    )
    peak, losses = [], losses_of(model)

    def watching(x, y):
        peak.append([p.detach().clone() for p in model.parameters()])
        return losses(x, y)

    x, y = on(device)
    with pytest.warns(UserWarning, match=r"% of the entries of the first perturbation") as caught:
        optimizer.backward(watching, x.to(dtype), y)
    # The warning is correct: compute the share again, from the float32 gradient.
    stayed = sum(int((a == b).sum()) for a, b in zip(peak[-1], start, strict=True))
    total = sum(p.numel() for p in start)
    said = float(str(caught[0].message).split("%")[0]) / 100
    assert said == pytest.approx(stayed / total, abs=0.06)
    assert 0.02 < said < 1.0
    same([p.detach() for p in model.parameters()], start, "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(losses, x.to(dtype), y)


@devices
def test_no_warning_if_nothing_is_rounded_away(device):
    model = net(dropout=0.0).to(device)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=1e-6)
    optimizer.step(losses_of(model), *on(device))  # warnings are errors
    wide = nn.Linear(4, 2, bias=False).to(device, torch.bfloat16)
    optimizer = ESAM(torch.optim.SGD(wide.parameters(), lr=0.1), wide, rho=50.0, beta=1.0)
    x = torch.randn(4, 4, device=device, dtype=torch.bfloat16)
    optimizer.step(lambda x: wide(x).square().sum(1), x)


@devices
def test_fifty_bf16_steps_at_lr_zero_move_nothing(device):
    model = net().to(device, torch.bfloat16)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.3)
    x, y = on(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(50):
            optimizer.step(losses_of(model), x.bfloat16(), y)
    same([p.detach() for p in model.parameters()], start, "weights")
