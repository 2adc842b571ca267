"""Momentum-SAM (Becker, Altrock and Risse 2024, arXiv 2401.12033), plain and adaptive.

The perturbation is epsilon = -rho v / ||v|| along the momentum v of the steps before, which SGD
has at hand: the step costs one forward and one backward, like SGD's. The adaptive form weighs v as
ASAM weighs the gradient, epsilon = -rho theta^2 v / || |theta| v ||. The paper's efficient
algorithm keeps the perturbed weights between steps; here they are perturbed and restored within
a step, which computes the same and leaves the weights as they are for evaluation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["msam_step"]


def msam_step(
    sgd: torch.optim.SGD, backward: Callable[[], None], rho: float, *, adaptive: bool
) -> None:
    """Take one step of SGD with the gradient at theta + epsilon.

    Args:
        sgd: with momentum; its buffers are v. In the first step there are none, and no
            perturbation.
        backward: leaves the gradient in `.grad`.
        rho: radius, >= 0.
        adaptive: weigh the momentum with the weights.
    """
    weights: list[Tensor] = []
    momenta: list[Tensor] = []
    for group in sgd.param_groups:
        for parameter in group["params"]:
            buffer = sgd.state[parameter].get("momentum_buffer")
            if buffer is not None:
                weights.append(parameter.data)
                momenta.append(buffer)
    copies = [w.clone() for w in weights]
    sgd.zero_grad()
    try:
        if weights and rho > 0.0:
            direction: list[Tensor] = momenta
            if adaptive:
                weighed = torch._foreach_mul(momenta, weights)  # sign of theta: the norm ignores it
                direction = torch._foreach_mul(weighed, weights)
                norms = torch._foreach_norm(weighed)
            else:
                norms = torch._foreach_norm(momenta)
            length = torch.linalg.vector_norm(torch.stack(list(norms)))
            torch._foreach_add_(weights, torch._foreach_mul(direction, -rho / (length + 1e-12)))
        backward()
    finally:
        if weights:
            torch._foreach_copy_(weights, copies)
    sgd.step()
