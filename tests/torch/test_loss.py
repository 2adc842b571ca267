"""The loss: `loss.backward()` computes ESAM's gradient, in any training loop."""

import copy
import threading
import warnings

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, same, sgd
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esam_core import ESAMRuntimeError, ESAMValueError, NonFiniteError
from esam_torch import (
    ESAM,
    Bernoulli,
    Only,
    Part,
    Previous,
    Random,
    Suffix,
    TopIncrease,
    TopLoss,
)


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
    fp16.scale(optimizer.loss(overflowing, *batch())).backward()
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
        ESAMRuntimeError, match=r"must be called once.*optimizer\.loss\(\.\.\.\) ag"
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
    assert kinds == [torch.bfloat16] * 3
    optimizer.loss(noted, *batch())
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.loss(losses, *batch())
    loss = optimizer.loss(noted, *batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert kinds[3:] == [torch.float32] * 4


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
    assert not errors and dtypes == [torch.bfloat16] * 3
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


def test_values_computed_outside_losses_are_refused():
    model, optimizer, _ = make(beta=1.0, gamma=1.0)

    def head(features, y):
        return F.cross_entropy(model.head(features), y, reduction="none")

    x, y = batch()
    features = torch.tanh(model.hidden(F.relu(model.norm(model.conv(x))).mean((2, 3))))
    with pytest.raises(ESAMRuntimeError, match="Compute it inside `losses`"):
        optimizer.loss(head, features, y)
    loss = optimizer.loss(lambda y: head(features, y), y)
    with pytest.raises(ESAMRuntimeError, match="Compute it inside `losses`"):
        loss.backward()
    optimizer.loss(head, features.detach(), y).backward()


@pytest.mark.parametrize("options", [{}, {"rho": 0.0}], ids=["esam", "base"])
def test_gradients_of_tensors_outside_the_model(options):
    """A batch, a temperature, a generator's images: as in any backward."""
    model, optimizer, _ = make(gamma=0.5, beta=1.0, **options)
    model.dropout.p = 0.0
    x, y = batch()
    x.requires_grad_()
    shift = torch.zeros(1, requires_grad=True)
    temperature = torch.ones(1, requires_grad=True)

    def warm(x, y):
        return F.cross_entropy(model(x) / temperature, y, reduction="none")

    optimizer.loss(warm, x + shift, y).backward()
    indices = optimizer.report.indices
    chosen = range(len(x)) if indices is None else indices.tolist()
    rows = [i for i in range(len(x)) if x.grad[i].any()]
    assert rows == list(chosen)
    torch.testing.assert_close(shift.grad[0], x.grad.sum())
    assert temperature.grad is not None and temperature.grad.abs() > 0


@pytest.mark.parametrize("options", [{}, {"beta": 1.0, "gamma": 1.0}, {"ascend": Previous()}])
def test_other_leaves_get_their_gradient_in_every_step(options):
    """A perturbation of the inputs that each step creates; a temperature that is used late."""
    model, optimizer, _ = make(**options)
    temperature = torch.ones(1, requires_grad=True)
    for step in range(7):
        (x, y), delta = batch(seed=step), torch.zeros(2, 6, 6, requires_grad=True)
        scale = temperature if step == 6 else 1.0

        def losses(x, y, delta=delta, scale=scale):
            return F.cross_entropy(model(x + delta) / scale, y, reduction="none")

        optimizer.zero_grad()
        optimizer.loss(losses, x, y).backward()
        optimizer.step()
        assert delta.grad is not None and delta.grad.abs().max() > 1e-4
        assert (temperature.grad is not None) == (step == 6)


def test_its_gradient_has_no_graph():
    model, optimizer, losses = make()
    for rho in (0.3, 0.0):  # also in a base step
        optimizer.param_groups[0]["esam_rho"] = rho
        loss = optimizer.loss(losses, *batch())
        with pytest.raises(ESAMRuntimeError, match="`create_graph` must be False"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


# -- terms that a forward keeps ------------------------------------------------------------------


class Keeping(nn.Module):
    """A network that keeps an auxiliary loss, features, or features without a graph."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.trunk, self.aux, self.head = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        features = torch.tanh(self.trunk(x))
        if self.kept == "loss":
            self.early = self.aux(features).square().mean()
        elif self.kept == "in a list":
            self.early = [self.aux(features), None]
        else:
            self.early = features.detach()
        return self.head(features)


@pytest.mark.parametrize("kept", ["loss", "in a list", "detached"])
def test_a_term_that_the_forward_keeps_has_its_gradient(kept):
    """After the first step, which sees that there is a graph; a warning says so."""
    torch.manual_seed(0)
    model, (x, y) = Keeping(kept), (torch.randn(8, 4), torch.randint(3, (8,)))
    optimizer = ESAM(sgd(model), model, perturb=Suffix("head"), gamma=1.0)
    losses = lambda x, y: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    optimizer.step(losses, x, y)
    for step in range(3):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = optimizer.loss(losses, x, y)
        assert len(caught) == (step == 0 and kept != "detached")
        assert not caught or "detach or delete them there" in str(caught[0].message)
        if kept == "detached":
            loss.backward()
            continue
        term = model.early if kept == "loss" else model.early[0].square().mean()
        wanted = torch.autograd.grad(term, list(model.aux.parameters()), retain_graph=True)
        (loss + term).backward()
        for parameter, gradient in zip(model.aux.parameters(), wanted, strict=True):
            assert torch.equal(parameter.grad, gradient)
        optimizer.step()


# -- losses that depend on no perturbed weight -----------------------------------------------------


class Tasks(nn.Module):
    """A trunk with two heads."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x, task):
        return getattr(self, task)(torch.tanh(self.trunk(x)))


def tasks(**options):
    torch.manual_seed(0)
    model = Tasks()
    return model, ESAM(sgd(model), model, rho=0.5, **options)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_batch_that_uses_no_perturbed_unit_gives_the_ordinary_gradient(gamma):
    model, optimizer = tasks(perturb=Only("b.*"), select=Random(gamma))
    torch.manual_seed(1)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    report = optimizer.backward(
        lambda x, y: F.cross_entropy(model(x, "a"), y, reduction="none"), x, y
    )
    assert float(report.perturbation_norm) == float(report.gradient_norm) == 0.0
    chosen = slice(None) if gamma == 1.0 else report.indices
    plain = copy.deepcopy(model)
    plain.zero_grad()
    F.cross_entropy(plain(x[chosen], "a"), y[chosen]).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_a_model_whose_batches_use_different_parts_trains():
    """Some masks of the default perturb only the head of the other task."""
    model, optimizer = tasks()
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    norms = []
    for step in range(80):
        task = "ab"[step % 2]
        report = optimizer.step(
            lambda x, y, task=task: F.cross_entropy(model(x, task), y, reduction="none"), x, y
        )
        norms.append(float(report.perturbation_norm))
    assert 0.0 in norms and max(norms) > 0.5
    assert report.loss < 0.5


def test_a_selection_without_a_graph_gives_zeros():
    """A constant loss for images without objects: the others use the parameters."""
    model, optimizer = tasks(beta=1.0, select=TopLoss(0.5))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def losses(x, y, empty):
        if empty.all():
            return torch.full((len(x),), 9.0)
        return torch.where(empty, 9.0, F.cross_entropy(model(x, "a"), y, reduction="none"))

    empty = torch.arange(8) < 4
    before = copy.deepcopy(model.state_dict())
    report = optimizer.backward(losses, x, y, empty)
    assert report.indices.tolist() == [0, 1, 2, 3]
    for name, parameter in model.named_parameters():
        used = not name.startswith("b.")
        assert (parameter.grad is not None) == used
        assert not used or not parameter.grad.any()
        assert torch.equal(parameter, before[name])
    never = torch.ones(8, dtype=torch.bool)
    with pytest.raises(ESAMValueError, match="`losses` must depend on the model's parameters"):
        optimizer.backward(losses, x, y, never)


@pytest.mark.parametrize("options", [{"perturb": Suffix("b")}, {"ascend": Part(0.5), "beta": 1.0}])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_losses_without_parameters_are_refused_also_in_part(options, gamma):
    model, optimizer = tasks(**options, gamma=gamma)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def detached(x, y):
        return F.cross_entropy(model(x, "b").detach(), y, reduction="none")

    with pytest.raises(ESAMValueError, match="`losses` must depend on the model's parameters"):
        optimizer.backward(detached, x, y)
    assert optimizer.count == 0


class WithPenalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def losses(self, x, y, *, ask=False):
        with torch.enable_grad():
            hidden = torch.tanh(self.body(x))
            if ask:
                hidden.requires_grad_()
            values = F.cross_entropy(self.head(hidden), y, reduction="none")
            (slope,) = torch.autograd.grad(values.sum(), hidden, create_graph=True)
            return values + slope.square().sum(1)


def test_a_penalty_on_a_pruned_activation_names_the_way_out():
    torch.manual_seed(0)
    model = WithPenalty()
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    optimizer = ESAM(sgd(model), model, perturb=Suffix("head"), gamma=1.0)
    before = Snapshot(model)
    with pytest.raises(RuntimeError) as raised:
        optimizer.loss(model.losses, x, y)
    assert any("`.requires_grad_()`" in note for note in raised.value.__notes__)
    before.check()
    optimizer.loss(lambda x, y: model.losses(x, y, ask=True), x, y).backward()
    found = gradients(model)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    full = ESAM(sgd(twin), twin, perturb=Suffix("head"), gamma=1.0, norm="masked")
    full.backward(lambda x, y: twin.losses(x, y, ask=True), x, y)
    close(found, gradients(twin))


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
