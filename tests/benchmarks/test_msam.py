"""Momentum-SAM, which is `ascend=Momentum()`, compared with its equations."""

import copy
from collections.abc import Callable

import pytest
import torch
from benchmarks.methods import METHODS, make_stepper
from benchmarks.models import build
from torch import Tensor
from torch.nn import functional as F


def msam_step(
    sgd: torch.optim.SGD, backward: Callable[[], None], rho: float, *, adaptive: bool
) -> None:
    """Run one step of SGD with the gradient at theta - rho v / ||v||.

    Becker, Altrock and Risse 2024 (arXiv 2401.12033); if adaptive, as in ASAM, at theta - rho
    theta^2 v / || |theta| v ||.
    """
    weights = [p.data for group in sgd.param_groups for p in group["params"] if p in sgd.state]
    momenta = [s["momentum_buffer"] for s in sgd.state.values()]
    copies = [w.clone() for w in weights]
    sgd.zero_grad()
    if weights:
        direction: list[Tensor] = momenta
        weighed = torch._foreach_mul(momenta, weights) if adaptive else momenta
        if adaptive:
            direction = torch._foreach_mul(weighed, weights)
        length = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(weighed))))
        torch._foreach_add_(weights, torch._foreach_mul(direction, -rho / (length + 1e-12)))
    backward()
    if weights:
        torch._foreach_copy_(weights, copies)
    sgd.step()


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


@pytest.mark.parametrize("name", ["momentum", "momentum-adaptive", "msam", "msam-adaptive"])
def test_the_method_equals_it_bit_for_bit(name: str) -> None:
    method = METHODS[name]
    torch.manual_seed(0)
    model = build("resnet10", classes=4, channels=3, size=16, width=4)
    twin = copy.deepcopy(model)
    sgd, other = (
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for m in (model, twin)
    )
    stepper = make_stepper(method, sgd, model, model_name="resnet10", rho=0.1, steps=5)
    rho = 0.1 if method.rho is None else method.rho
    for _ in range(5):
        x, y = torch.randn(8, 3, 16, 16), torch.randint(4, (8,))
        stepper.step(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
        msam_step(
            other,
            lambda x=x, y=y: F.cross_entropy(twin(x), y).backward(),
            rho,
            adaptive=method.adaptive,
        )
        for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(p, q)
