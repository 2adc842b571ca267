"""A model with its ESAM, and gradients of steps, for tests of `ESAM.loss`."""

import torch
from tests.torch.scene import batch, losses_of, net, sgd

from esam_torch import ESAM


def make(seed=0, **options):
    model = net(seed)
    options = {"rho": 0.3, "beta": 0.6, "gamma": 0.5, **options}
    return model, ESAM(sgd(model), model, **options), losses_of(model)


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def esam_gradient(scale=1.0, seed=1, **options):
    """Return the gradient of `backward`, times a number."""
    model, optimizer, losses = make(**options)
    torch.manual_seed(5)
    optimizer.backward(losses, *batch(seed=seed))
    return {n: None if g is None else g * scale for n, g in gradients(model).items()}


def close(found, wanted, tolerance=1e-6):
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)
