"""What could differ on a GPU.

Everything runs on a CPU too; tests that compare a device with a CPU then show only that they work.
"""

import pytest
import torch
from tests.torch.devices import cuda, devices, needs_cuda, on
from tests.torch.scene import SUFFIX_PART, batch, losses_of, net, same, sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import (
    ESAM,
    Everything,
    Momentum,
    Part,
    Previous,
    Proportional,
    Random,
    Suffix,
    TopIncrease,
    TopLoss,
)

OPTIONS = {
    "paper": {},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "ASAM": {"adaptive": True, "rho": 1.0},
    "estimated": {"norm": "estimated"},
    "full": {"norm": "full"},
    "suffix, part": SUFFIX_PART,
    "part, random": {"select": Random(0.5), "ascend": Part(0.5)},
    "previous": {"gamma": 1.0, "ascend": Previous()},
    "momentum": {"gamma": 1.0, "ascend": Momentum()},
    "top loss": {"select": TopLoss(0.3)},
    "top increase": {"select": TopIncrease(0.3)},
    "proportional": {"select": Proportional(0.5)},
    "base steps": {"rho": 0.0},
}

options = pytest.mark.parametrize("options", OPTIONS)


def esam(model, name, base=sgd):
    return ESAM(base(model), model, **{"rho": 0.1, **OPTIONS[name]})


def train(model, optimizer, device, seeds=range(3)):
    """Run steps in float64, and return what they selected."""
    seen = []
    for seed in seeds:
        x, y = on(device, seed=seed)
        report = optimizer.step(losses_of(model), x.double(), y)
        indices = None if report.indices is None else report.indices.tolist()
        seen.append((report.perturbed, indices))
    return seen


def agree(found, wanted, device):
    """Require equal states; on a GPU up to rounding, as sums there have no fixed order."""
    if device == "cpu":
        same(found.state_dict(), wanted.state_dict(), "weights")
        return
    for (name, a), b in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        exact = a.dtype == torch.float64
        assert torch.allclose(a, b, rtol=1e-9 if exact else 1e-4, atol=1e-6), name


def rng_state(device):
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


def set_rng_state(state, device):
    (torch.set_rng_state if device == "cpu" else torch.cuda.set_rng_state)(state.cpu())


# -- steps -------------------------------------------------------------------------------------


@devices
@options
def test_steps_are_those_of_a_cpu(options, device):
    there, here = net(dropout=0.0).double().to(device), net(dropout=0.0).double()
    found = train(there, esam(there, options), device)
    assert found == train(here, esam(here, options), "cpu")
    for (name, a), b in zip(there.state_dict().items(), here.state_dict().values(), strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-9, atol=1e-10), name


BASES = {
    "SGD fused": lambda m: sgd(m, fused=True),
    "SGD foreach": lambda m: sgd(m, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
}


@devices
@pytest.mark.parametrize("base", BASES)
def test_base_optimizers(base, device):
    there, here = net(dropout=0.0).double().to(device), net(dropout=0.0).double()
    train(there, esam(there, "SAM", BASES[base]), device)
    train(here, esam(here, "SAM", BASES[base]), "cpu")
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-7, atol=1e-9)


@devices
@pytest.mark.parametrize("options", ["SAM", "paper", "suffix, part"])
def test_random_numbers_are_those_of_one_forward(options, device):
    model = net(dropout=0.5).to(device)
    optimizer = esam(model, options)
    data = on(device)
    optimizer.backward(losses_of(model), *data)  # finds the blocks, once
    before = rng_state(device)
    optimizer.backward(losses_of(model), *data)
    after = rng_state(device)
    set_rng_state(before, device)
    losses_of(model)(*data)
    assert torch.equal(rng_state(device), after)
    assert not torch.equal(before, after)


@devices
def test_passes_have_the_same_dropout(device):
    """With a perturbation that changes nothing, the losses of both passes are equal."""
    model = net(dropout=0.5).double().to(device).eval()
    model.dropout.train()  # BatchNorm keeps its running statistics
    optimizer = ESAM(sgd(model), model, rho=1e-12, beta=1.0, gamma=1.0)
    x, y = on(device)
    seen = []

    def losses(x, y):
        seen.append(losses_of(model)(x, y))
        return seen[-1]

    for _ in range(2):
        optimizer.step(losses, x.double(), y)
    for first, second in (seen[-2:], seen[-4:-2]):
        assert torch.allclose(first, second, rtol=1e-9)
    assert not torch.allclose(seen[-1], seen[-3], rtol=1e-3)


# -- where things are --------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("options", ["paper", "suffix, part", "previous"])
def test_a_model_that_moves_after_the_optimizer_was_created(options, device):
    moved, there = net(dropout=0.0).double(), net(dropout=0.0).double().to(device)
    ours = esam(moved, options)
    ours.measured_units(losses_of(moved), *(t.double() for t in batch()[:1]), batch()[1])
    moved.to(device)
    assert train(moved, ours, device) == train(there, esam(there, options), device)
    agree(moved, there, device)


@devices
@options
def test_a_default_device(options, device):
    plain, there = net(dropout=0.0).double().to(device), net(dropout=0.0).double().to(device)
    wanted = train(plain, esam(plain, options), device)
    default, batches = "meta" if device == "cpu" else device, [on(device, seed=s) for s in range(3)]
    optimizer, seen = esam(there, options), []
    with torch.device(default):
        for x, y in batches:
            report = optimizer.step(losses_of(there), x.double(), y)
            seen.append(report.perturbed)
    assert seen == [perturbed for perturbed, _ in wanted]
    agree(there, plain, device)


@pytest.mark.parametrize("options", ["paper", "suffix, part"])
@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), cuda(False), cuda(True)])
def test_a_batch_that_losses_moves(options, device, pinned):
    there, moving = net(dropout=0.0).to(device), net(dropout=0.0).to(device)
    ours, wanted = esam(moving, options), esam(there, options)

    def losses(x, y):
        return losses_of(moving)(x.to(device, non_blocking=True), y.to(device, non_blocking=True))

    for seed in range(3):
        data = batch(seed=seed)
        ours.step(losses, *(t.pin_memory() if pinned else t for t in data))
        wanted.step(losses_of(there), *(t.to(device) for t in data))
    agree(moving, there, device)


@devices
@pytest.mark.parametrize("options", ["paper", "suffix, part", "previous", "momentum"])
@pytest.mark.parametrize("saved_to", ["cpu", "device"])
def test_resuming(options, saved_to, device, tmp_path):
    whole = net().double().to(device)
    optimizer = esam(whole, options)
    train(whole, optimizer, device)
    state = {"model": whole.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "random": rng_state(device)}, tmp_path / "state.pt")
    wanted = train(whole, optimizer, device, range(3, 6))
    place = device if saved_to == "device" else "cpu"
    saved = torch.load(tmp_path / "state.pt", map_location=place, weights_only=True)
    model = net(seed=5).double().to(device)
    resumed = esam(model, options)
    model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    set_rng_state(saved["random"], device)
    assert train(model, resumed, device, range(3, 6)) == wanted
    agree(model, whole, device)


@devices
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("options", ["paper", "suffix, part"])
def test_an_error_in_any_pass_leaves_the_weights(options, failing, device):
    model = net().to(device)
    optimizer = esam(model, options)
    data = on(device)
    optimizer.step(losses_of(model), *data)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = rng_state(device)
    passes = []

    def losses(x, y):
        passes.append(x)
        if len(passes) == failing:
            raise KeyboardInterrupt
        return losses_of(model)(x, y)

    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(losses, *data)
    same(model.state_dict(), before, "weights")
    assert torch.equal(rng_state(device), random)


# -- layers with kernels of their own ----------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(4, 8, batch_first=True)
        self.second = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)[0])[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(4, 8)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layers(self.embed(x)).mean(1))


@devices
@pytest.mark.parametrize("options", ["paper", "SAM", "suffix, part"])
@pytest.mark.parametrize("make", [Recurrent, Attentive])
def test_recurrent_layers_and_attention(make, options, device):
    def steps(device):
        torch.manual_seed(0)
        model = make().double().to(device)
        optimizer = esam(model, options)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(8, 5, 4, generator=generator, dtype=torch.float64)
            optimizer.step(losses_of(model), x.to(device), (torch.arange(8) % 3).to(device))
        return [p.detach().cpu() for p in model.parameters()]

    for a, b in zip(steps(device), steps("cpu"), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


# -- streams -----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
@options
def test_another_stream(options):
    plain, there = net(dropout=0.0).double().cuda(), net(dropout=0.0).double().cuda()
    wanted = train(plain, esam(plain, options), "cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert train(there, esam(there, options), "cuda") == wanted
    torch.cuda.synchronize()
    for a, b in zip(there.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.gpu
@needs_cuda
def test_a_whole_step_waits_for_nothing():
    model = net().cuda()
    optimizer = ESAM(sgd(model), model, perturb=Suffix(0.5), gamma=1.0, ascend=Part(0.25))
    x, y = on("cuda")

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    for count in range(12):
        torch.cuda.set_sync_debug_mode("error" if count > 1 else "default")
        try:
            optimizer.zero_grad()
            optimizer.loss(losses, x, y).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
