"""Mixed precision: autocast, gradient scaling and overflows."""

import contextlib
import functools

import pytest
import torch
from tests.torch.devices import devices, on
from tests.torch.scene import SUFFIX_PART, Snapshot, batch, losses_of, net, same, sgd
from torch import nn
from torch.nn import functional as F

import esam_torch.perturbation
from esam_torch import ESAM, Batch, Everything, Part, Suffix, TopLoss
from esam_torch.finiteness import zero_unless
from esam_torch.guards import Settings


def autocast_losses(model, device, dtype):
    """Return a user's function with autocast."""

    def losses(x, y):
        with torch.autocast(device, dtype):
            return F.cross_entropy(model(x), y, reduction="none")

    return losses


def gradients(model):
    return [p.grad.detach().clone() for p in model.parameters()]


def close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-7


# -- autocast ----------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_full_precision(dtype, device):
    """The same samples, and gradients equal up to rounding; weights and gradients stay float32."""
    model, wide = net(dropout=0.0).to(device), net(dropout=0.0).to(device)
    options = {"rho": 0.1, "perturb": Everything(), "select": TopLoss(0.5)}
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
    reference = ESAM(torch.optim.SGD(wide.parameters(), lr=0.1), wide, **options)
    report = optimizer.backward(autocast_losses(model, device, dtype), *on(device))
    wanted = reference.backward(losses_of(wide), *on(device))
    assert report.losses.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    eps = torch.finfo(dtype).eps
    close([report.losses], [wanted.losses], 4 * eps)
    close([report.gradient_norm], [wanted.gradient_norm], 16 * eps)
    assert report.indices.tolist() == wanted.indices.tolist()
    close(gradients(model), gradients(wide), 32 * eps)


@devices
@pytest.mark.parametrize("perturb", [Everything(), Suffix("head")], ids=["all", "suffix"])
def test_autocast_around_the_step_equals_autocast_inside(perturb, device):
    """autocast caches casts of the weights, which must not be used for other weights."""
    found = []
    for inside in (True, False):
        model = net().to(device)
        base = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = ESAM(base, model, rho=2.0, perturb=perturb, gamma=0.5)
        torch.manual_seed(3)
        bare = losses_of(model)
        wrapped = autocast_losses(model, device, torch.bfloat16)
        for seed in range(3):
            if inside:
                report = optimizer.step(wrapped, *on(device, seed=seed))
            else:
                with torch.autocast(device, torch.bfloat16):
                    report = optimizer.backward(bare, *on(device, seed=seed))
                    model.eval()
                    after = model(on(device)[0])
                    model.train()
                with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                    model.eval()
                    same(after.detach(), model(on(device)[0]), "a forward after the step")
                    model.train()
                optimizer.step()
                optimizer.zero_grad()
        found.append((report.losses, report.perturbed_losses, model.state_dict()))
    same(found[1], found[0], "autocast around the step")


@devices
@pytest.mark.parametrize("options", [{"gamma": 0.5}, SUFFIX_PART], ids=["half", "suffix-part"])
def test_autocast_around_the_loss_but_not_around_its_backward(options, device):
    """On an accelerator a backward runs in its own thread, which has its own autocast settings."""
    found, dtypes = [], []
    for inside in (True, False):
        model = net().to(device)
        base = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = ESAM(base, model, **{"rho": 2.0, **options})
        bare = losses_of(model)

        def losses(x, y, model=model, bare=bare):
            dtypes.append(model.head(x.new_ones(1, 6)).dtype)
            return bare(x, y)

        optimizer.step(losses, *on(device, seed=0))  # finds the blocks
        dtypes.clear()
        optimizer.zero_grad()
        torch.manual_seed(3)
        with torch.autocast(device, torch.bfloat16):
            loss = optimizer.loss(losses, *on(device))
            if inside:
                loss.backward()
        if not inside:
            assert not torch.is_autocast_enabled(device)
            loss.backward()
        assert len(dtypes) == (3 if "ascend" not in options else 2)
        assert set(dtypes) == {torch.bfloat16}
        found.append(gradients(model))
    close(found[1], found[0], 0.0 if device == "cpu" else 1e-3)


# -- gradient scaling --------------------------------------------------------------------------


def scaled_step(optimizer, scaler, losses, *data, clip=None):
    """One iteration of a typical fp16 script."""
    optimizer.zero_grad()
    scaler.scale(optimizer.loss(losses, *data)).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(optimizer.model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    return optimizer.report


@devices
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(
    "options", [{"gamma": 0.5}, {"gamma": 1.0}, SUFFIX_PART], ids=["half", "all", "suffix-part"]
)
def test_a_power_of_two_scale_changes_nothing(options, clip, device):
    """A scale that is a power of two changes only exponents: training is the same bit for bit."""
    models = []
    for scale in (None, 2.0**12):
        model = net().to(device)
        scaler = torch.amp.GradScaler(device, init_scale=scale or 1.0, enabled=scale is not None)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = ESAM(base, model, **{"rho": 0.1, **options})
        torch.manual_seed(3)
        for seed in range(4):
            report = scaled_step(
                optimizer, scaler, losses_of(model), *on(device, seed=seed), clip=clip
            )
        models.append((model.state_dict(), report.gradient_norm, report.perturbation_norm))
    same(models[1], models[0], "scaled")


class Tiny(nn.Module):
    """A model whose fp16 gradients underflow unless they are scaled."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))[:, 0]


def tiny_losses(model, device):
    def losses(x):
        with torch.autocast(device, torch.float16):
            # An activation gradient of 1e-6 / 8 per sample, after an fp16 edge of the graph.
            return (model(x) * 1.0).float() * 1e-7

    return losses


@devices
def test_the_ascent_gradient_does_not_underflow(device):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(device)
    norms = {}
    for scale in (None, 2.0**16):
        model = Tiny().to(device)
        scaler = None if scale is None else torch.amp.GradScaler(device, init_scale=scale)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = ESAM(base, model, rho=0.1, beta=1.0, gamma=0.5)
        loss = optimizer.loss(tiny_losses(model, device), x)
        (loss if scaler is None else scaler.scale(loss)).backward()
        report = optimizer.report
        norms[scale] = (float(report.gradient_norm), float(report.perturbation_norm))
    assert norms[None][1] == 0.0 or norms[None][0] < 0.5 * norms[2.0**16][0]
    # Unscaled before the norm: the true gradient norm, and the requested radius.
    assert 1e-8 < norms[2.0**16][0] < 1e-5
    assert norms[2.0**16][1] == pytest.approx(0.1, rel=1e-4)


BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@devices
@pytest.mark.parametrize("base", BASES)
def test_fused_bases_under_a_scaler(base, device):
    """A fused optimizer can unscale gradients itself; under ESAM it gets unscaled gradients."""
    models = []
    for scale in (1.0, 2.0**10):
        model = net().to(device)
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        optimizer = ESAM(BASES[base](model.parameters()), model, rho=0.1)
        torch.manual_seed(3)
        for seed in range(3):
            scaled_step(optimizer, scaler, losses_of(model), *on(device, seed=seed))
        models.append(model.state_dict())
    same(models[1], models[0], "scaled")


def overflowing(losses, passes):
    """Return losses that overflow fp16 in these passes of the step, including backwards."""
    calls = []

    @functools.wraps(losses)  # the same function for ESAM, which has read a batch of it
    def wrapped(x, y):
        calls.append(len(x))
        values = losses(x, y)
        return (values.half() * 60000.0 * 60000.0).float() if len(calls) in passes else values

    return wrapped


@devices
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("passes", [(1,), (2,), (3,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_an_overflow_in_any_pass_backs_off_and_recovers(base, passes, clip, device):
    model = net().to(device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    optimizer = ESAM(BASES[base](model.parameters()), model, rho=0.1, gamma=0.5)
    losses = losses_of(model)
    scaled_step(optimizer, scaler, losses, *on(device), clip=clip)
    before = Snapshot(model, optimizer.base_optimizer)
    scaled_step(optimizer, scaler, overflowing(losses, passes), *on(device), clip=clip)
    before.check(but=("gradients", "random", "buffers"))
    assert all(not p.grad.isfinite().any() for p in model.parameters())
    assert scaler.get_scale() == 512.0
    moved = model.head.weight.detach().clone()
    report = scaled_step(optimizer, scaler, losses, *on(device), clip=clip)
    assert float(report.perturbation_norm) > 0.0
    assert not torch.equal(model.head.weight, moved)
    assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("waits", [True, False], ids=["host", "as on a GPU"])
@pytest.mark.parametrize("ascend", [Batch(), Part(0.5)], ids=repr)
def test_passes_after_an_overflow_run_at_the_weights(ascend, waits, monkeypatch):
    """At weights that are NaN, statistics would be NaN for good, and some losses raise errors."""
    monkeypatch.setattr(esam_torch.perturbation, "on_host", lambda device: waits)
    model = net()
    optimizer = ESAM(sgd(model), model, perturb=Everything(), gamma=1.0, ascend=ascend)
    seen, losses = [], losses_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(optimizer, scaler, losses, *batch())
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    losses = overflowing(losses, (1,))
    report = scaled_step(optimizer, scaler, losses, *batch())
    assert scaler.get_scale() == 512.0
    assert len(seen) == 2 and all(output.isfinite().all() for output in seen)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert float(report.perturbation_norm) == 0.0


@pytest.mark.parametrize("usable", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.cfloat, torch.cdouble],
    ids=str,
)
def test_tensors_are_zero_unless_a_condition_holds(dtype, usable):
    tensors = [
        torch.tensor([1.5, float("nan"), float("inf"), -0.0, -2.0]).to(dtype),
        torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
        torch.randn(4, 3).to(dtype).t(),
        torch.zeros(0, dtype=dtype),
    ]
    condition = torch.tensor(usable)
    expected = [torch.where(condition, t, torch.zeros_like(t)) for t in tensors]
    zero_unless(condition, tensors)
    for found, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@devices
@pytest.mark.parametrize("overflows", [None, "esam", "plain"])
def test_a_scaler_shared_with_another_optimizer(overflows, device):
    """As in a GAN: each optimizer skips only its own overflow, and ESAM's step is not affected."""
    found = []
    for scaler in (None, torch.amp.GradScaler(device, init_scale=1024.0)):
        model, other = net().to(device), nn.Linear(6, 2).to(device)
        esam = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1, gamma=0.5)
        plain = torch.optim.SGD(other.parameters(), lr=0.1)
        losses, (x, y) = losses_of(model), on(device)
        start = [p.detach().clone() for p in (*model.parameters(), *other.parameters())]
        esam.zero_grad()
        plain.zero_grad()
        first, second = esam.loss(losses, x, y), other(x.flatten(1)[:, :6]).square().mean()
        if scaler is None:
            (first + second).backward()
            esam.step()
            plain.step()
        else:
            factors = [3e38 if name == overflows else 1.0 for name in ("esam", "plain")]
            (scaler.scale(first) * factors[0] + scaler.scale(second) * factors[1]).backward()
            scaler.step(esam)
            scaler.step(plain)
            scaler.update()
            assert scaler.get_scale() == (1024.0 if overflows is None else 512.0)
        found.append([p.detach().clone() for p in (*model.parameters(), *other.parameters())])
    n = len(list(model.parameters()))
    wanted = found[0][:]
    if overflows is not None:
        skipped = slice(0, n) if overflows == "esam" else slice(n, None)
        wanted[skipped] = start[skipped]
    for value, right in zip(found[1], wanted, strict=True):
        assert torch.equal(value, right)


@devices
def test_scaled_training_finds_its_scale(device):
    """A scale that is far too large decreases until it fits, and the model learns."""
    model = net(dropout=0.0).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
        model,
        rho=0.05,
        beta=0.6,
        gamma=0.5,
    )
    losses = autocast_losses(model, device, torch.float16)
    seen = [
        float(scaled_step(optimizer, scaler, losses, *on(device, b=16), clip=1.0).loss)
        for _ in range(80)
    ]
    assert 1.0 < scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())
    assert seen[-1] < 0.7 * seen[0]


@devices
def test_accumulating_under_a_scaler(device):
    found = []
    for scale in (1.0, 2.0**8):
        model = net().to(device)
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = ESAM(base, model, rho=0.1)
        torch.manual_seed(3)
        for seed in range(3):
            scaler.scale(optimizer.loss(losses_of(model), *on(device, seed=seed))).backward()
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"unscale_"):
            scaler.unscale_(optimizer)  # torch's check for non-finite gradients
        scaler.step(optimizer)
        scaler.update()
        found.append(model.state_dict())
    same(found[1], found[0], "accumulated")


def test_the_current_device_is_that_of_the_forward(monkeypatch):
    """As on a GPU, where the thread of a backward has the loss's device as its current one."""
    current, used = [1], []

    class Fake:
        current_device = staticmethod(lambda: current[0])

        @staticmethod
        @contextlib.contextmanager
        def device(index):
            before, current[0] = current[0], index
            yield
            current[0] = before

    monkeypatch.setattr(torch, "get_device_module", lambda kind: Fake)
    settings = Settings([torch.device("cuda", 0), torch.device("cpu")])
    settings.note()
    current[0] = 0  # in the other thread
    settings.call(lambda: used.append(current[0]))
    assert used == [1] and current == [0]
