"""No step waits for the device: the host queues work, and reads no values.

On a GPU, torch itself reports waits (`set_sync_debug_mode`). Without a GPU, every operation that
would wait for one raises an error; CPU tensors then represent those of the device.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tests.torch.devices import needs_cuda
from tests.torch.scene import batch, losses_of, net, sgd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import esam_torch.perturbation
from esam_torch import (
    ESAM,
    Bernoulli,
    Everything,
    Only,
    Proportional,
    Random,
    RunningMeans,
    Suffix,
    TopIncrease,
    TopLoss,
)
from esam_torch.devices import copies_ahead, widest
from esam_torch.fitting.measures import Means, Seen

#: Operations that return a value to the host, or whose result's size depends on values.
WAITS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero"),
    *("aten::masked_select", "aten::equal", "aten::unique_dim", "aten::_unique2", "aten::bincount"),
    *("aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::allclose"),
}


class NoWaits(TorchDispatchMode):
    """Raise on operations that would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        # States of random generators are bytes on the host, for every device.
        bytes_ = any(isinstance(x, torch.Tensor) and x.dtype == torch.uint8 for x in args)
        if name.split(".")[0] in WAITS or name in WAITS:
            assert bytes_, f"{name} waits for the device"
        if name.startswith("aten::index."):
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype is not torch.bool for i in indices), "a boolean index waits"
        if name == "aten::_to_copy" and (kwargs or {}).get("device") is not None:
            assert kwargs.get("non_blocking"), "a blocking copy waits"
        return func(*args, **(kwargs or {}))


CASES = {
    "paper": {},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "weights": {"perturb": Bernoulli(0.5, unit="weight")},
    "ASAM": {"adaptive": True},
    "suffix": {"perturb": Suffix("head")},
    "suffix, SAM": {"perturb": Suffix("head"), "gamma": 1.0},
    "norms": {"perturb": Only("norm")},
    "estimated": {"norm": "estimated"},
    "full": {"norm": "full"},
    "none": {"norm": "none"},
    "top loss": {"select": TopLoss(0.3)},
    "random": {"select": Random(0.3)},
    "proportional": {"select": Proportional(0.5)},
    "proportional increase": {"select": Proportional(0.5, score="increase")},
    "top increase": {"select": TopIncrease(0.3)},
    "base steps": {"rho": 0.0},
}


def make(name, device="cpu"):
    model = net().to(device)
    return model, ESAM(sgd(model), model, **{"rho": 0.1, **CASES[name]})


@pytest.mark.parametrize("name", CASES)
def test_by_operation(name, monkeypatch):
    model, optimizer = make(name)
    data = batch()
    optimizer.backward(losses_of(model), *data)  # finds the blocks, once
    monkeypatch.setattr(esam_torch.perturbation, "on_host", lambda device: False)
    means = RunningMeans()
    with NoWaits():
        for _ in range(2):
            (optimizer.loss(losses_of(model), *data) * 8.0).backward()
            means.update(optimizer.report)
        optimizer.base_optimizer.step()
    assert means.result()["loss"] > 0.0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.double().to("cpu", torch.float16),
    ],
)
def test_waits_are_detected(wait):
    with NoWaits(), pytest.raises(AssertionError, match=r"waits"):
        wait(torch.ones(3))


def test_skipping_and_raising_wait_once():
    """The cost of the other two modes: one check of all gradients together."""
    model = net()
    looks = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero"):
                looks.append(func.name())
            return func(*args, **(kwargs or {}))

    for mode in ("skip", "raise"):
        optimizer = ESAM(sgd(model), model, on_nonfinite=mode, beta=1.0, gamma=1.0)
        optimizer.backward(losses_of(model), *batch())
        plain = ESAM(sgd(model), model, beta=1.0, gamma=1.0)
        looks.clear()
        with Counting():
            plain.backward(losses_of(model), *batch())
        before = len(looks)
        looks.clear()
        with Counting():
            optimizer.backward(losses_of(model), *batch())
        assert len(looks) == before + 1


def test_a_batch_on_the_host_for_a_model_on_the_device():
    """Copies to the host are waited for: an unfinished copy must not be read."""
    x = torch.arange(3)
    assert esam_torch.devices.on_device(x, torch.device("cpu")) is x
    moved = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "aten::_to_copy":
                moved.append(bool((kwargs or {}).get("non_blocking")))
            return func(*args, **(kwargs or {}))

    with Copies():
        esam_torch.devices.on_device(torch.ones(2), torch.device("meta"))
        with pytest.raises(NotImplementedError):  # meta tensors have no data; only the call matters
            esam_torch.devices.on_device(torch.ones(2, device="meta"), torch.device("cpu"))
    assert moved == [True, False]


def test_numbers_of_reports_are_summed_on_the_host(monkeypatch):
    """A number that is copied to the device would be waited for."""
    model, optimizer = make("paper")
    losses = losses_of(model)
    means = Means({}, torch.device("cpu"))
    data = batch()

    def seen(x, y):
        values = losses(x, y)
        return values, Seen(values.detach(), None, (x, y))

    reports = [optimizer.backward(seen, *data) for _ in range(2)]
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, None)
    for report in reports:
        means.add_step(report)
    found = means.result()
    assert found["sample_share"] == 0.5
    assert found["weight_share"] == sum(report.weight_share for report in reports) / 2


def test_copies_ahead_and_wide_numbers(monkeypatch):
    """MPS must not copy memory that the host may free, and has no float64, as some of Intel's."""
    kinds = {kind: torch.device(kind) for kind in ("cpu", "cuda", "mps", "xpu")}
    assert [kind for kind, d in kinds.items() if copies_ahead(d)] == ["cuda", "xpu"]
    for wide in (True, False):
        monkeypatch.setattr(
            torch.xpu, "get_device_properties", lambda _, wide=wide: SimpleNamespace(has_fp64=wide)
        )
        found = {kind for kind, d in kinds.items() if widest(d) == torch.float64}
        assert found == {"cpu", "cuda"} | ({"xpu"} if wide else set())


@contextlib.contextmanager
def no_synchronisation():
    """Raise an error on every wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    model, optimizer = make(name, "cuda")
    data = tuple(t.cuda() for t in batch())
    optimizer.backward(losses_of(model), *data)
    means = RunningMeans()
    with no_synchronisation():
        for _ in range(2):
            means.update(optimizer.backward(losses_of(model), *data))
    assert means.result()["loss"] > 0.0


@pytest.mark.gpu
@needs_cuda
def test_a_batch_on_the_host_is_sliced_correctly():
    model = net(dropout=0.0).cuda()
    optimizer = ESAM(sgd(model), model, rho=0.1, gamma=0.5)
    x, y = batch()
    seen = []

    def losses(x, y):
        seen.append(y.tolist())
        return F.cross_entropy(model(x.cuda()), y.cuda(), reduction="none")

    report = optimizer.step(losses, x, y)
    assert seen[2] == y[report.indices.cpu()].tolist()
