"""Momentum-SAM against its equations, written out."""

import pytest
import torch
from benchmarks.methods.msam import msam_step


@pytest.mark.parametrize("adaptive", [False, True])
def test_three_steps_follow_the_equations(adaptive: bool) -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    lr, momentum, rho = 0.1, 0.9, 0.5
    sgd = torch.optim.SGD([weight], lr=lr, momentum=momentum)
    theta, v = weight.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        msam_step(sgd, lambda: (0.5 * weight @ matrix @ weight).backward(), rho, adaptive=adaptive)
        epsilon = torch.zeros_like(v)
        if v.any():
            scale = theta.abs() if adaptive else torch.ones_like(theta)
            epsilon = -rho * scale**2 * v / (scale * v).norm()
        v = momentum * v + matrix @ (theta + epsilon)
        theta = theta - lr * v
        torch.testing.assert_close(weight.detach(), theta)


def test_weights_come_back_after_an_error() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    msam_step(sgd, lambda: weight.square().sum().backward(), 1.0, adaptive=False)
    before = weight.detach().clone()

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        msam_step(sgd, fail, 1.0, adaptive=False)
    assert torch.equal(weight.detach(), before)
