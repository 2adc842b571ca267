"""Scaled losses, gradient scalers, and losses that are not finite."""

import pytest
import torch
from tests.torch.scene import Snapshot, batch
from tests.torch.steps import close, esam_gradient, gradients, make
from torch import nn

from esam_core import NonFiniteError
from esam_torch import Rows


@pytest.mark.parametrize("factor", [0.25, 3.0, 65536.0])
def test_a_scale_scales_only_the_gradient(factor):
    model, optimizer, losses = make()
    torch.manual_seed(5)
    (optimizer.loss(losses, *batch()) * factor).backward()
    close(gradients(model), esam_gradient(factor), 1e-5 * factor)


@pytest.mark.parametrize("factor", [0.25, 1024.0])
def test_no_norm_under_a_scale(factor):
    """Algorithm 1 as printed perturbs along g itself, which must be unscaled."""
    model, optimizer, losses = make(norm="none")
    torch.manual_seed(5)
    (optimizer.loss(losses, *batch()) * factor).backward()
    close(gradients(model), esam_gradient(factor, norm="none"), 1e-5 * factor)


def test_a_negative_scale_reverses_the_direction():
    """The perturbation increases what is minimised: here minus the loss."""
    model, optimizer, losses = make(beta=1.0, gamma=1.0)
    torch.manual_seed(5)
    (-optimizer.loss(losses, *batch())).backward()
    twin, other, same_losses = make(beta=1.0, gamma=1.0)
    torch.manual_seed(5)
    other.backward(lambda x, y: -same_losses(x, y), *batch())
    close(gradients(model), gradients(twin))
    turned = esam_gradient(-1.0, beta=1.0, gamma=1.0)
    assert not torch.allclose(turned["head.weight"], model.head.weight.grad, rtol=1e-2)


@pytest.mark.parametrize("norm", ["masked", "none"])
def test_a_scale_of_zero_gives_gradients_of_zero(norm):
    model, optimizer, losses = make(norm=norm)
    (optimizer.loss(losses, *batch()) * 0.0).backward()
    assert all(not g.any() for g in gradients(model).values())
    assert float(optimizer.report.perturbation_norm) == 0.0


def test_accumulation_and_clipping():
    model, optimizer, losses = make()
    torch.manual_seed(5)
    for seed in (1, 2):
        (optimizer.loss(losses, *batch(seed=seed)) / 2).backward()
    twin, other, same_losses = make()
    torch.manual_seed(5)
    for seed in (1, 2):
        other.backward(same_losses, *batch(seed=seed))
    close(gradients(model), {n: g / 2 for n, g in gradients(twin).items()})
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.01
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert 0.0 < float((model.head.weight - before).detach().norm()) <= 0.1 * 0.01 * 1.001


def scaler(scale=1024.0):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)


def test_a_scaler_that_esam_does_not_know():
    model, optimizer, losses = make()
    fp16 = scaler()
    torch.manual_seed(5)
    fp16.scale(optimizer.loss(losses, *batch())).backward()
    fp16.unscale_(optimizer)
    close(gradients(model), esam_gradient())
    before = model.head.weight.detach().clone()
    fp16.step(optimizer)
    fp16.update()
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("which", [1, 2, 3], ids=["ascent", "selection", "descent"])
def test_the_scaler_detects_overflow_in_any_pass(which):
    model, optimizer, losses = make()
    calls = []

    def overflowing(x, y):
        calls.append(len(x))
        values = losses(x, y)
        return values * torch.inf if len(calls) == which else values

    fp16 = scaler()
    before = Snapshot(model)
    fp16.scale(optimizer.loss(overflowing, *map(Rows, batch()))).backward()
    fp16.step(optimizer)
    fp16.update()
    before.check(but=("gradients", "buffers", "random"))
    assert fp16.get_scale() == 512.0
    optimizer.zero_grad()
    fp16.scale(optimizer.loss(losses, *batch())).backward()
    fp16.step(optimizer)
    assert not torch.equal(model.head.weight, before.taken["weights"]["head.weight"])


def broken(losses):
    return lambda x, y: losses(x, y) * torch.tensor([torch.nan] + [1.0] * (len(x) - 1))


@pytest.mark.parametrize("rho", [0.3, 0.0])
def test_nonfinite_values_are_propagated(rho):
    model, optimizer, losses = make(rho=rho)
    optimizer.loss(broken(losses), *batch()).backward()
    assert all(g.isnan().any() for g in gradients(model).values())
    assert optimizer.report.skipped is False


@pytest.mark.parametrize("rho", [0.3, 0.0])
def test_nonfinite_values_are_skipped(rho):
    model, optimizer, losses = make(rho=rho, on_nonfinite="skip")
    optimizer.loss(losses, *batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = Snapshot(model)
    optimizer.loss(broken(losses), *batch()).backward()
    assert optimizer.report.skipped and optimizer.count == 2
    optimizer.step()  # runs no update: momentum would move the weights
    before.check(but=("random",))
    optimizer.loss(losses, *batch()).backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before.taken["weights"]["head.weight"])


@pytest.mark.parametrize("rho", [0.3, 0.0])
def test_nonfinite_values_raise(rho):
    model, optimizer, losses = make(rho=rho, on_nonfinite="raise")
    before = Snapshot(model)
    loss = optimizer.loss(broken(losses), *batch())
    with pytest.raises(NonFiniteError):
        loss.backward()
    before.check()
    assert optimizer.count == 0
