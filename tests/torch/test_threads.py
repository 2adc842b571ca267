"""Passes in a backward: on an accelerator they run in another thread, with settings of its own."""

import contextvars
import threading

import pytest
import torch
from tests.torch.engine import backward_in_a_thread_of_the_engine
from tests.torch.scene import SUFFIX_PART, batch, losses_of, net, same, sgd
from torch import nn

from esam_core import ESAMRuntimeError
from esam_torch import ESAM, Everything, Momentum, Part, Previous, Proportional, TopLoss

OPTIONS = {
    "paper": {},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "suffix, part": SUFFIX_PART,
    "part, selection": {"gamma": 0.5, "ascend": Part(0.5)},
    "proportional": {"select": Proportional(0.5)},
    "previous": {"gamma": 0.5, "ascend": Previous()},
    "momentum": {"gamma": 0.5, "ascend": Momentum()},
    "skipping": {"on_nonfinite": "skip"},
}

options = pytest.mark.parametrize("options", OPTIONS)


def backward(loss, there):
    if there:
        backward_in_a_thread_of_the_engine(loss)
    else:
        loss.backward()


def esam(model, name):
    return ESAM(sgd(model), model, **{"rho": 0.1, **OPTIONS[name]})


@options
def test_steps_are_those_of_the_main_thread(options):
    found = []
    for there in (False, True):
        model = net()
        optimizer = esam(model, options)
        for seed in range(4):
            optimizer.zero_grad()
            backward(optimizer.loss(losses_of(model), *batch(seed=seed)), there)
            optimizer.step()
        found.append((model.state_dict(), torch.get_rng_state()))
    same(found[1], found[0], "state")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("options", ["paper", "SAM", "suffix, part"])
def test_each_pass_has_the_settings_of_the_first(options, there):
    variable = contextvars.ContextVar("variable", default="unset")
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 3))
    optimizer = esam(model, options)
    seen = []

    def losses(x, y):
        seen.append(
            (
                variable.get(),
                torch.zeros(1).device.type,
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
            )
        )
        return losses_of(model)(x, y)

    data = batch()
    token = variable.set("set")
    with (
        torch.device("meta"),
        torch.autocast("cpu", torch.float16),
    ):
        loss = optimizer.loss(losses, *data)
    variable.reset(token)
    backward(loss, there)
    assert len(seen) >= 2
    assert set(seen) == {("set", "meta", True, torch.float16)}


class Partly(nn.Module):
    """A network with a part in full precision, also under autocast."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        with torch.autocast("cpu", enabled=False):
            return self.last(hidden.float()).square().flatten()


def plain_gradients(model, x, indices=slice(None)):
    """Return the gradients of the mean loss, with autocast around the forward only."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mean = model(x)[indices].mean()
    mean.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("how", ["loss", "thread", "backward"])
@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.0},
        {"select": TopLoss(0.5)},
        {"select": Proportional(1.0)},
        {"gamma": 1.0, "ascend": Part(0.5)},
        {"gamma": 1.0, "ascend": Previous()},
    ],
    ids=repr,
)
def test_backward_passes_are_not_under_the_autocast_of_the_loss(options, how):
    """As in torch: autocast around a loss does not affect what its backward computes."""
    torch.manual_seed(0)
    model, x = Partly(), torch.randn(256, 64)
    optimizer = ESAM(sgd(model, lr=0.0), model, rho=1e-20, perturb=Everything(), **options)
    for _ in range(2):  # the first step with `Previous` is a base step
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if how == "backward":
                optimizer.backward(model, x)
            else:
                loss = optimizer.loss(model, x)
        if how != "backward":
            backward(loss, how == "thread")
        found = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    report = optimizer.report
    chosen = slice(None) if report.indices is None else report.indices
    for p, q in zip(found, plain_gradients(model, x, chosen), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)
    climbed = plain_gradients(model, x, slice(None) if report.part is None else report.part)
    if "ascend" not in options or report.part is not None:
        length = torch.cat([g.flatten() for g in climbed]).norm()
        assert torch.allclose(report.gradient_norm, length, rtol=1e-6)


def test_what_losses_sets_in_the_context():
    """Later passes find what the first one has set; what they set is dropped."""
    variable = contextvars.ContextVar("count", default=0)
    model, seen = net(), []

    def losses(x, y):
        seen.append(variable.get())
        variable.set(variable.get() + 1)
        return losses_of(model)(x, y)

    for there in (False, True):
        seen.clear()
        variable.set(0)
        backward(esam(model, "paper").loss(losses, *batch()), there)
        assert seen == [0, 1, 1, 1, 1]  # the second and third compare the losses
        assert variable.get() == 1


def test_any_name_of_an_argument():
    model = net()

    def losses(x, y, function, args):
        assert function == args == 1
        return losses_of(model)(x, y)

    esam(model, "paper").step(losses, *batch(), function=1, args=1)


def test_state_of_the_users_thread():
    """The backward has none of it, so that the passes would differ."""
    kept = threading.local()
    kept.scale = 2.0
    model = net()
    optimizer = esam(model, "SAM")

    def losses(x, y):
        return kept.scale * losses_of(model)(x, y)

    backward_in_a_thread_of_the_engine(optimizer.loss(losses_of(model), *batch()))
    loss = optimizer.loss(losses, *batch())
    with pytest.raises(ESAMRuntimeError, match=r"no `kept\.scale` any more"):
        backward_in_a_thread_of_the_engine(loss)
