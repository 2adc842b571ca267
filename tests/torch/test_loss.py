"""The loss: `loss.backward()` computes ESAM's gradient, in any training loop."""

import copy
import threading

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, same, sgd
from tests.torch.steps import close, esam_gradient, gradients, make
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esam_core import ESAMRuntimeError
from esam_torch import ESAM, Bernoulli, Suffix, TopIncrease


@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 1.0}, {"beta": 1.0}, {"beta": None, "perturb": Suffix("hidden")}, {"rho": 0.0}],
    ids=["paper", "whole batch", "all weights", "suffix", "base"],
)
def test_it_equals_backward_bit_for_bit(options):
    model, optimizer, losses = make(**options)
    twin, other, same_losses = make(**options)
    for seed in range(3):
        optimizer.zero_grad()
        loss = optimizer.loss(losses, *batch(seed=seed))
        assert optimizer.count == seed
        loss.backward()
        optimizer.step()
    for module in (twin,):
        torch.manual_seed(0)
        net(0)  # the same draws as `make`
        for seed in range(3):
            other.zero_grad()
            report = other.backward(same_losses, *batch(seed=seed))
            other.step()
        assert report.count == 2 and module is twin
    assert optimizer.report is not None and torch.equal(optimizer.report.losses, report.losses)
    same(model.state_dict(), twin.state_dict(), "after three steps")


def test_it_is_not_the_gradient_at_theta():
    model, optimizer, losses = make()
    torch.manual_seed(5)
    optimizer.loss(losses, *batch()).backward()
    found = gradients(model)
    model, _, losses = make()
    torch.manual_seed(5)
    losses(*batch()).mean().backward()
    assert not torch.allclose(found["head.weight"], model.head.weight.grad, rtol=1e-2)


def test_its_value_is_the_mean_loss_at_theta():
    model, optimizer, losses = make()
    torch.manual_seed(5)
    loss = optimizer.loss(losses, *batch())
    torch.manual_seed(5)
    twin = net()
    torch.manual_seed(5)
    assert loss.shape == () and loss.requires_grad
    assert torch.equal(loss.detach(), losses_of(twin)(*batch()).mean().detach())
    del model


def test_a_sum_with_a_penalty():
    model, optimizer, losses = make()
    torch.manual_seed(5)
    (optimizer.loss(losses, *batch()) + 0.1 * model.head.weight.square().sum()).backward()
    wanted = esam_gradient()
    wanted["head.weight"] = wanted["head.weight"] + 0.2 * model.head.weight.detach()
    close(gradients(model), wanted)


def test_two_losses_at_the_same_time():
    """Each is a separate step on its own batch; both draw the same mask."""
    model, optimizer, losses = make(select=TopIncrease(0.5), gamma=None)
    model.dropout.p = 0.0
    model.norm.eval()
    first, second = optimizer.loss(losses, *batch(seed=1)), optimizer.loss(losses, *batch(seed=2))
    (first + 2.0 * second).backward()
    found, count = gradients(model), optimizer.count
    wanted = None
    for seed, factor in ((1, 1.0), (2, 2.0)):
        model, optimizer, losses = make(select=TopIncrease(0.5), gamma=None)
        model.dropout.p = 0.0
        model.norm.eval()
        optimizer.backward(losses, *batch(seed=seed))
        part = {n: factor * g for n, g in gradients(model).items()}
        wanted = part if wanted is None else {n: wanted[n] + g for n, g in part.items()}
    close(found, wanted)
    assert count == 2


@pytest.mark.parametrize("options", [{}, {"rho": 0.0}], ids=["esam", "base"])
def test_hooks_of_parameters_run_once(options):
    model, optimizer, losses = make(**options)
    seen = []
    model.head.weight.register_hook(lambda g: seen.append("hook") or g * 2)
    model.head.weight.register_post_accumulate_grad_hook(lambda _: seen.append("after"))
    torch.manual_seed(5)
    optimizer.loss(losses, *batch()).backward()
    assert seen == ["hook", "after"]
    wanted = esam_gradient(**options)
    wanted["head.weight"] = wanted["head.weight"] * 2
    close(gradients(model), wanted)


@pytest.mark.parametrize("options", [{}, {"rho": 0.0}], ids=["esam", "base"])
def test_a_second_backward_is_refused(options):
    model, optimizer, losses = make(**options)
    loss = optimizer.loss(losses, *batch())
    loss.backward(retain_graph=True)
    before = Snapshot(model, optimizer)
    with pytest.raises(
        ESAMRuntimeError, match=r"must be called only once.*optimizer\.loss\(\.\.\.\) ag"
    ):
        loss.backward()
    before.check()
    assert optimizer.count == 1


def test_a_loss_without_a_backward_is_a_plain_forward():
    model, optimizer, losses = make()
    twin = copy.deepcopy(model)
    before = Snapshot(model, optimizer)
    torch.manual_seed(5)
    loss = optimizer.loss(losses, *batch())
    random = torch.get_rng_state()
    del loss
    before.check(but=("buffers", "random"))
    assert optimizer.count == 0 and optimizer.report is None
    torch.manual_seed(5)
    losses_of(twin)(*batch())
    same(model.state_dict(), twin.state_dict(), "after a forward")
    assert torch.equal(random, torch.get_rng_state())


def test_without_gradients_it_is_a_plain_forward():
    _, optimizer, losses = make()
    calls = []

    def counted(x, y):
        calls.append(torch.is_grad_enabled())
        return losses(x, y)

    with torch.no_grad():
        loss = optimizer.loss(counted, *batch())
    assert not loss.requires_grad and calls == [False] and optimizer.count == 0


def test_autocast_around_the_loss_alone():
    model, optimizer, losses = make()
    kinds = []

    def noted(x, y):
        values = losses(x, y)
        kinds.append(model.hidden(torch.zeros(1, 4)).dtype)
        return values

    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = optimizer.loss(noted, *batch())
    loss.backward()
    assert kinds == [torch.bfloat16] * 5  # two of them to compare the losses
    optimizer.loss(noted, *batch())
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.loss(losses, *batch())
    loss = optimizer.loss(noted, *batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert kinds[5:] == [torch.float32] * 4


def test_a_graph_from_before_the_step_stays_valid():
    """It has saved weights that the step changes and restores, which autograd must not notice."""
    model, optimizer, losses = make(beta=1.0)
    model.eval()
    x, _ = batch()
    held = model(x).sum()
    wanted = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    versions = [p._version for p in model.parameters()]
    optimizer.loss(losses, *batch(seed=1)).backward()
    assert [p._version for p in model.parameters()] == versions
    found = torch.autograd.grad(held, list(model.parameters()))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_weights_are_restored_if_a_forward_replaces_their_memory():
    model, optimizer, _ = make(beta=1.0, gamma=1.0)
    plain = losses_of(model)

    def losses(*arguments):
        model.head.weight.data = model.head.weight.data.clone()
        return plain(*arguments)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.loss(losses, *batch()).backward()
    same(dict(model.named_parameters()), before, "after the step")


def test_a_checkpointed_model():
    model, optimizer, _ = make()

    def losses(x, y):
        features = checkpoint(
            lambda x: F.relu(model.norm(model.conv(x))).mean((2, 3)), x, use_reentrant=False
        )
        hidden = checkpoint(
            lambda x: torch.tanh(model.hidden(model.dropout(x))), features, use_reentrant=False
        )
        return F.cross_entropy(model.head(hidden), y, reduction="none")

    model.norm.momentum = 0.0  # a checkpoint runs the layer twice
    twin, other, plain = make()
    twin.norm.momentum = 0.0
    for run, f in ((optimizer, losses), (other, plain)):
        torch.manual_seed(5)
        for seed in range(3):
            run.loss(f, *batch(seed=seed)).backward()
    close(gradients(model), gradients(twin), 1e-7)


def test_gradients_by_autograd():
    model, optimizer, losses = make()
    torch.manual_seed(5)
    found = torch.autograd.grad(optimizer.loss(losses, *batch()), list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    names = [n for n, _ in model.named_parameters()]
    close(dict(zip(names, found, strict=True)), esam_gradient())


def test_in_another_thread():
    """As on a GPU, where a backward runs in autograd's own thread."""
    model, optimizer, losses = make()
    torch.manual_seed(5)
    dtypes = []

    def noted(x, y):
        values = losses(x, y)
        dtypes.append(model.hidden(torch.zeros(1, 4)).dtype)
        return values

    with torch.autocast("cpu", torch.bfloat16):
        loss = optimizer.loss(noted, *batch())
    errors = []

    def run():
        try:
            assert not torch.is_autocast_enabled("cpu")
            loss.backward()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors and dtypes == [torch.bfloat16] * 5
    twin, other, same_losses = make()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        other.backward(same_losses, *batch())
    close(gradients(model), gradients(twin), 1e-7)


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
@pytest.mark.parametrize("call", [1, 2, 3], ids=["ascent", "selection", "descent"])
def test_an_error_in_any_pass(call, error):
    model, optimizer, losses = make()
    optimizer.loss(losses, *batch()).backward()
    calls = []

    def failing(x, y):
        calls.append(len(x))
        values = losses(x, y)
        if len(calls) == call:
            raise error
        return values

    before = Snapshot(model, optimizer)
    with pytest.raises(type(error)) as raised:
        optimizer.loss(failing, *batch()).backward()
    assert raised.value is error and raised.value.__cause__ is None
    before.check()
    assert optimizer.count == 1


def test_its_gradient_has_no_graph():
    model, optimizer, losses = make()
    for rho in (0.3, 0.0):  # also in a base step
        optimizer.param_groups[0]["esam_rho"] = rho
        loss = optimizer.loss(losses, *batch())
        with pytest.raises(ESAMRuntimeError, match="`create_graph` must be False"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_copies_of_the_attributes_share_the_state():
    """Lightning and Fabric wrap an optimizer by copying its `__dict__`."""
    _, optimizer, losses = make()

    class Wrapper:
        pass

    wrapper = Wrapper()
    wrapper.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})
    wrapper.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
    wrapper.backward(losses, *batch())
    optimizer.step()
    assert optimizer.count == wrapper.count == 1
    assert wrapper.state_dict()["esam"]["count"] == 1


def test_a_closure_runs_the_backward_itself():
    model, optimizer, losses = make()
    twin, other, same_losses = make()

    def closure():
        optimizer.zero_grad()
        loss = optimizer.loss(losses, *batch())
        loss.backward()
        return loss

    torch.manual_seed(5)
    assert optimizer.step(closure).shape == ()
    torch.manual_seed(5)
    other.step(same_losses, *batch())
    same(model.state_dict(), twin.state_dict(), "after a step")


# torch's compiler reads `.grad` of every tensor after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_sampler_of_a_compiled_function_is_not_traced():
    model = nn.Linear(4, 3)
    optimizer = ESAM(sgd(model), model, perturb=Bernoulli(0.9), gamma=1.0)
    x, y = torch.randn(8, 4), torch.arange(8) % 3

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    @torch.compile(backend="eager")
    def train(x, y):
        optimizer.zero_grad()
        optimizer.loss(losses, x, y).backward()
        optimizer.step()

    twin = copy.deepcopy(model)
    other = ESAM(sgd(twin), twin, perturb=Bernoulli(0.9), gamma=1.0)
    for _ in range(3):
        train(x, y)
        other.step(lambda x, y: F.cross_entropy(twin(x), y, reduction="none"), x, y)
    assert optimizer.count == 3
    close(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-6)
