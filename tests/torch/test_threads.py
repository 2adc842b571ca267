"""Passes in a backward: on an accelerator they run in another thread, with settings of its own."""

import contextvars
import threading

import pytest
import torch
from tests.torch.engine import backward_in_a_thread_of_the_engine
from tests.torch.scene import SUFFIX_PART, batch, losses_of, net, same, sgd
from torch import nn

from esam_core import ESAMRuntimeError
from esam_torch import ESAM, Everything, Momentum, Part, Previous, Proportional

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
    optimizer.step(losses, *data)
    seen.clear()
    token = variable.set("set")
    with (
        torch.device("meta"),
        torch.autocast("cpu", torch.float16),
    ):
        loss = optimizer.loss(losses, *data)
    variable.reset(token)
    backward(loss, there)
    assert len(seen) >= 2
    # In the user's own thread, context variables are what the user sets.
    own = "set" if there else "unset"
    assert seen[0] == ("set", "meta", True, torch.float16)
    assert set(seen[1:]) == {(own, "meta", True, torch.float16)}


class Partly(nn.Module):
    """A network with a part in full precision, also under autocast."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        with torch.autocast("cpu", enabled=False):
            return self.last(hidden.float()).square().flatten()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.0},
        {"gamma": 0.999},  # all samples, with a selection pass
        {"gamma": 1.0, "ascend": Part(1.0)},
    ],
    ids=repr,
)
def test_backward_passes_are_not_under_the_autocast_of_the_loss(options, there):
    """As in torch: autocast around a loss does not affect what its backward computes."""
    torch.manual_seed(0)
    model = Partly()
    x = torch.randn(256, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mean = model(x).mean()
    mean.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    optimizer = ESAM(sgd(model), model, rho=1e-20, perturb=Everything(), **options)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = optimizer.loss(model, x)
    backward(loss, there)
    for p, q in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(p.grad, q)


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
    with pytest.raises(ESAMRuntimeError, match=r"no `kept\.scale` in the backward, which on a GPU"):
        backward_in_a_thread_of_the_engine(loss)
