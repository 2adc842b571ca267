"""Models of all kinds, each compared with a hand-written step."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from tests.torch.scene import batch, losses_of, net, same, sgd
from torch import nn
from torch.nn import functional as F

from esam_core import ESAMValueError
from esam_core.perturbation import perturbations
from esam_torch import (
    ESAM,
    Bernoulli,
    Everything,
    Momentum,
    Only,
    Part,
    Previous,
    Random,
    SideBySide,
    Suffix,
    TopLoss,
    Whole,
)


def pick(tree, indices, b):
    """Return rows of a batch, as a user would write it for this batch."""
    if isinstance(tree, torch.Tensor):
        return tree[indices] if tree.dim() and len(tree) == b else tree
    if isinstance(tree, dict):
        return {key: pick(value, indices, b) for key, value in tree.items()}
    return tuple(pick(value, indices, b) for value in tree)


def by_hand(model, losses, data, rho, adaptive=False):
    """Run ESAM's passes literally (beta = 1, gamma = 1/2), and write gradients to `.grad`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    entry = torch.get_rng_state()
    at_entry = copy.deepcopy(dict(model.named_buffers()))
    before = losses(*data)
    left = torch.get_rng_state()
    statistics = copy.deepcopy(dict(model.named_buffers()))
    found = torch.autograd.grad(before.mean(), parameters, allow_unused=True)
    found = [None if g is None else g.to_dense() for g in found]
    pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
    stretched = [p.detach().abs() * g if adaptive else g for p, g in pairs]
    length = torch.cat([g.flatten().abs() for g in stretched]).norm()
    theta = [p.detach().clone() for p, _ in pairs]
    with torch.no_grad():
        for (p, _), g in zip(pairs, stretched, strict=True):
            p += rho * (p.abs() * g if adaptive else g) / length
        for name, buffer in model.named_buffers():  # every pass reads the same state as the first
            buffer.copy_(at_entry[name])
        torch.set_rng_state(entry)
        after = losses(*data)
        for name, buffer in model.named_buffers():
            buffer.copy_(at_entry[name])
    b = len(before)
    k = -(-b // 2)
    order = torch.sort(after - before.detach(), descending=True, stable=True).indices
    selected = order[:k].sort().values
    torch.set_rng_state(entry)
    losses(*pick(data, selected, b)).mean().backward()
    torch.set_rng_state(left)
    with torch.no_grad():
        for (p, _), start in zip(pairs, theta, strict=True):
            p.copy_(start)
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
    return before.detach(), after, selected, length


def close(name, found, wanted, **tolerance):
    """Require that two tensors are close; name them in the error."""
    torch.testing.assert_close(found, wanted, msg=lambda m: f"{name}: {m}", **tolerance)


def check(make, losses_for, data, *, rho=0.3, steps=3, dtype=torch.float64, **options):
    """Train a model with ESAM and by hand, and require equal results."""
    torch.manual_seed(0)
    model = make().to(dtype)
    twin = copy.deepcopy(model)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    other = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    optimizer = ESAM(base, model, rho=rho, perturb=Everything(), gamma=0.5, **options)
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {}
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        report = optimizer.backward(losses_for(model), *data)
        random = torch.get_rng_state()
        torch.manual_seed(step)
        other.zero_grad()
        before, after, selected, length = by_hand(
            twin, losses_for(twin), data, rho, options.get("adaptive", False)
        )
        assert torch.equal(random, torch.get_rng_state())
        assert report.indices.tolist() == selected.tolist()
        torch.testing.assert_close(report.losses, before, **tolerance)
        torch.testing.assert_close(report.perturbed_losses, after, **tolerance)
        torch.testing.assert_close(report.gradient_norm, length, **tolerance)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                close(name, p.grad, q.grad, **tolerance)
        base.step()
        other.step()
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            close(name, a, b, **tolerance)
    return model


def images(b=8, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(b) % 5


# -- convolutional -----------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width_in, width, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = norm(width)
        self.short = nn.Identity()
        if stride > 1 or width_in != width:
            self.short = nn.Sequential(nn.Conv2d(width_in, width, 1, stride), norm(width))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.short(x), inplace=True)


class ResNet(nn.Sequential):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(
            nn.Conv2d(3, 4, 3, 1, 1, bias=False),
            norm(4),
            nn.ReLU(),
            Residual(4, 4, 1, norm),
            Residual(4, 8, 2, norm),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8, 5),
        )


NORMS = {
    "BatchNorm": nn.BatchNorm2d,
    "BatchNorm without statistics": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "BatchNorm cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "SyncBatchNorm": nn.SyncBatchNorm,  # one process; see test_distributed.py for several
    "GroupNorm": lambda n: nn.GroupNorm(2, n),
    "InstanceNorm": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
    "LayerNorm": lambda n: nn.GroupNorm(1, n),
}


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
@pytest.mark.parametrize("norm", NORMS)
def test_resnet(norm, adaptive):
    check(lambda: ResNet(NORMS[norm]), losses_of, images(), adaptive=adaptive)


@pytest.mark.parametrize("b", [2, 3])
def test_batchnorm_with_few_samples(b):
    """With one selected sample, the descent pass uses the running statistics."""
    torch.manual_seed(0)
    model = ResNet().double()
    x, y = images(b)
    optimizer = ESAM(sgd(model), model, rho=0.1, perturb=Everything(), gamma=0.4 if b == 2 else 0.3)
    modes = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda m, *_: modes.append(m.training))
    report = optimizer.step(losses_of(model), x, y)
    assert report.indices.shape == (1,)
    layers = len(modes) // 3
    assert modes == [True] * (2 * layers) + [False] * layers
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("ascend", "select"),
    [(Previous(), Random(0.5)), (Momentum(), Random(0.5)), (Part(0.5), TopLoss(0.5))],
)
def test_running_statistics_that_no_pass_would_update_are_refused(ascend, select):
    torch.manual_seed(0)
    model = ResNet().double()
    esam = ESAM(sgd(model), model, perturb=Everything(), ascend=ascend, select=select)
    x, y = images(2)
    if not isinstance(ascend, Part):
        esam.step(losses_of(model), x, y)  # a base step
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ESAMValueError, match="which selects 1 of 2 samples"):
        esam.step(losses_of(model), x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in model.modules():  # statistics that are not updated anyway
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    esam.step(losses_of(model), x, y)


def test_frozen_batchnorm_stays_frozen():
    def make():
        model = ResNet()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
                layer.requires_grad_(False)
        return model

    model = check(make, losses_of, images())
    assert all(not m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not model[1].weight.requires_grad
    assert torch.equal(model[1].running_mean, torch.zeros(4, dtype=torch.float64))


def test_channels_last():
    """The memory format is kept, and so is every bit."""
    x, y = images()
    torch.manual_seed(0)
    plain = ResNet().double()
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    options = {"rho": 0.2, "perturb": Everything(), "gamma": 0.5}
    optimizer, other = (
        ESAM(sgd(model, lr=0.0), model, **options),
        ESAM(sgd(plain), plain, **options),
    )
    strides = [p.stride() for p in model.parameters()]
    torch.manual_seed(1)
    optimizer.step(losses_of(model), x.to(memory_format=torch.channels_last), y)
    torch.manual_seed(1)
    other.backward(losses_of(plain), x, y)
    assert [p.stride() for p in model.parameters()] == strides
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p.grad, q.grad)


# -- transformers, and batches of every shape --------------------------------------------------


class Encoder(nn.Module):
    """Token ids, an attention mask, optional segment ids; embeddings tied to the head."""

    def __init__(self, tied=True, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, sparse=sparse)
        self.segments = nn.Embedding(2, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.decoder = nn.Linear(8, 11)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask, segments=None):
        x = self.embedding(input_ids)
        if segments is not None:
            x = x + self.segments(segments)
        x = self.layer(x, src_key_padding_mask=attention_mask == 0)
        return self.decoder(self.norm(x))


def tokens(b=6, length=5):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(11, (b, length), generator=generator)
    mask = torch.ones(b, length, dtype=torch.long)
    mask[1, 3:] = 0
    labels = torch.randint(11, (b, length), generator=generator).masked_fill(mask == 0, -100)
    segments = torch.randint(2, (b, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "segments": segments, "labels": labels}


def token_losses(model):
    """Return the mean loss of the tokens of each sequence."""

    def losses(data):
        inputs = {key: value for key, value in data.items() if key != "labels"}
        values = F.cross_entropy(model(**inputs).transpose(1, 2), data["labels"], reduction="none")
        return values.sum(1) / (data["labels"] != -100).sum(1)

    return losses


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformer_with_a_dictionary(tied, adaptive):
    model = check(lambda: Encoder(tied), token_losses, (tokens(),), adaptive=adaptive)
    assert (model.decoder.weight is model.embedding.weight) == tied


def test_tied_weights_are_one_unit():
    model = Encoder()
    optimizer = ESAM(sgd(model), model, perturb=Everything())
    report = optimizer.step(token_losses(model), tokens())
    assert "embedding.weight" in report.perturbed and "decoder.weight" not in report.perturbed
    assert report.weight_share == 1.0
    only = ESAM(sgd(model), model, perturb=Only("embedding"))
    assert only.step(token_losses(model), tokens()).perturbed == (
        "embedding.weight",
        "segments.weight",
    )


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Record:
    pair: Pair
    name: str


class Encoding(dict):
    """A library's mapping with an attribute in addition to its items."""

    def __init__(self, *args, source="", **kwargs):
        super().__init__(*args, **kwargs)
        self.source = source


def nested(form, x, y):
    """Return (arguments, keywords, a function that extracts inputs and targets)."""
    return {
        "tuple": (((x, y),), {}, lambda d: d),
        "list": (([x, [y]],), {}, lambda d: (d[0], d[1][0])),
        "named tuple": ((Pair(x, y),), {}, lambda d: (d.inputs, d.targets)),
        "dict": (({"x": x, "deep": {"y": y}},), {}, lambda d: (d["x"], d["deep"]["y"])),
        "ordered": ((OrderedDict(x=x, y=y),), {}, lambda d: (d["x"], d["y"])),
        "mapping": (
            (Encoding({"x": x, "y": y}, source="here"),),
            {},
            lambda d: (d["x"], d["y"]) if d.source == "here" else None,
        ),
        "dataclass": (
            (Record(Pair(x, y), "one"),),
            {},
            lambda d: (d.pair.inputs, d.pair.targets) if d.name == "one" else None,
        ),
        "keywords": ((x,), {"y": y}, lambda x, y: (x, y)),
        "beside plain values": ((x, 3, None, "text", y), {}, lambda x, *_: (x, _[-1])),
    }[form]


FORMS = (
    *("tuple", "list", "named tuple", "dict", "ordered", "mapping", "dataclass", "keywords"),
    "beside plain values",
)


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_shape(form):
    args, kwargs, find = nested(form, *batch())
    model, plain = net(), net()
    optimizer, other = (ESAM(sgd(m), m, rho=0.1, gamma=0.5) for m in (model, plain))
    torch.manual_seed(3)
    wanted = other.step(losses_of(plain), *batch())
    torch.manual_seed(3)
    report = optimizer.step(lambda *a, **k: losses_of(model)(*find(*a, **k)), *args, **kwargs)
    assert report.indices.tolist() == wanted.indices.tolist()
    same(model.state_dict(), plain.state_dict(), form)


def test_whole_values_are_not_sliced():
    """Ten classes and ten samples: the class weights look like one value per sample."""
    model = net(dropout=0.0)
    optimizer = ESAM(sgd(model), model, rho=0.1, gamma=0.5)
    x, y = batch(3)
    seen = []

    def losses(x, y, weights):
        seen.append((len(x), len(weights)))
        return F.cross_entropy(model(x), y, weight=weights, reduction="none")

    report = optimizer.step(losses, x, y, Whole(torch.tensor([1.0, 2.0, 0.5])))
    assert seen == [(3, 3), (3, 3), (2, 3)]
    assert report.indices.shape == (2,)


def test_other_outputs_of_losses_are_in_the_report():
    model = net()
    optimizer = ESAM(sgd(model), model, rho=0.1)

    def losses(x, y):
        logits = model(x)
        return F.cross_entropy(logits, y, reduction="none"), {"logits": logits}

    report = optimizer.step(losses, *batch())
    assert report.outputs["logits"].shape == (8, 3)
    assert not report.outputs["logits"].requires_grad  # a kept report must not keep the graph


# -- recurrent, sparse, unused, frozen ---------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 6, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(6, 5)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        hidden = self.rnn(packed)[1]
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden[-1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 7, 4, generator=generator, dtype=torch.float64)
    data = (x, torch.tensor([7, 3, 5, 1, 6, 2]), torch.arange(6) % 5)

    def losses_for(model):
        return lambda x, n, y: F.cross_entropy(model(x, n), y, reduction="none")

    check(lambda: Recurrent(kind), losses_for, data)


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_sparse_embeddings(adaptive):
    """The descent gradient stays sparse, as SparseAdam needs; epsilon is dense."""
    data = (tokens(),)
    model = check(lambda: Encoder(tied=False, sparse=True), token_losses, data, adaptive=adaptive)
    assert model.embedding.weight.grad.is_sparse


def test_sparse_adam_with_another_optimizer():
    torch.manual_seed(0)
    model = Encoder(tied=False, sparse=True)
    dense = [p for n, p in model.named_parameters() if n != "embedding.weight"]
    base = SideBySide(
        torch.optim.SparseAdam([model.embedding.weight], lr=0.01), torch.optim.Adam(dense, lr=0.01)
    )
    optimizer = ESAM(base, model, rho=0.1, beta=0.6, on_nonfinite="skip")
    seen = [float(optimizer.step(token_losses(model), tokens()).loss) for _ in range(20)]
    assert seen[-1] < seen[0]
    optimizer.backward(token_losses(model), tokens())
    optimizer.backward(token_losses(model), tokens())  # onto a sparse gradient
    before = model.embedding.weight.grad.to_dense().clone()

    def fails(data):
        values = token_losses(model)(data)
        if len(values) < 6:
            values.register_hook(lambda _: 1 / 0)
        return values

    with pytest.raises(ZeroDivisionError):
        optimizer.backward(fails, tokens())
    assert torch.equal(model.embedding.weight.grad.to_dense(), before)


def test_nonfinite_sparse_values_are_detected():
    torch.manual_seed(0)
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = ESAM(torch.optim.SGD(model.parameters()), model, gamma=1.0, on_nonfinite="skip")
    data = torch.tensor([[0, 1], [2, 3]])
    factor = torch.tensor([1.0, float("nan")])
    report = optimizer.step(lambda x, f: model(x).sum((1, 2)) * f, data, factor)
    assert report.skipped and model.weight.grad is None


def test_unused_and_frozen_parameters_stay_as_they_are():
    model = net()
    model.unused = nn.Linear(2, 2)
    model.conv.requires_grad_(False)
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)  # frozen ones included
    optimizer = ESAM(base, model, rho=0.1, perturb=Everything())
    start = copy.deepcopy(model.state_dict())
    for _ in range(3):
        report = optimizer.step(losses_of(model), *batch())
    assert "conv.weight" not in report.perturbed
    assert "unused.weight" in report.perturbed
    assert model.unused.weight.grad is None and model.conv.weight.grad is None
    assert not model.conv.weight.requires_grad
    for name in ("conv.weight", "unused.weight", "unused.bias"):
        assert torch.equal(model.state_dict()[name], start[name])


def test_layers_unfrozen_during_training():
    model = net()
    model.conv.requires_grad_(False)
    optimizer = ESAM(sgd(model), model, rho=0.1, perturb=Everything())
    assert "conv.weight" not in optimizer.step(losses_of(model), *batch()).perturbed
    model.conv.requires_grad_(True)
    assert "conv.weight" in optimizer.step(losses_of(model), *batch()).perturbed
    model.head.requires_grad_(False)
    assert "head.weight" not in optimizer.step(losses_of(model), *batch()).perturbed


# -- buffers and parametrisations --------------------------------------------------------------


class Buffered(nn.Module):
    """Buffers that are written in place, replaced, and None."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(4), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("graph", torch.eye(4).to_sparse())  # as in networks over graphs

    def forward(self, x):
        self.calls += 1
        self.average = 0.5 * self.average + x.mean(0)
        return self.linear((self.graph @ x.T).T - self.average.detach())


def test_buffers_change_once_per_step():
    torch.manual_seed(0)
    model, plain = Buffered(), Buffered()
    plain.load_state_dict(model.state_dict())
    held = model.calls
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.3)
    for step in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.step(losses_of(model), x, torch.arange(6) % 3)
        plain(x)
        assert torch.equal(model.calls, plain.calls)
        assert torch.equal(model.average, plain.average)
    assert model.calls is held


@pytest.mark.parametrize("kind", ["spectral", "weight"])
def test_parametrised_weights(kind):
    def make():
        wrap = getattr(nn.utils.parametrizations, f"{kind}_norm")
        return nn.Sequential(wrap(nn.Linear(4, 8)), nn.Tanh(), wrap(nn.Linear(8, 5)))

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    check(make, losses_of, (x, torch.arange(8) % 5))


class Fourier(nn.Module):
    """Complex weights, as in spectral and state-space layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        spectrum = torch.fft.rfft(self.first(x)) * self.filter
        return self.head(torch.fft.irfft(spectrum, n=6))


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_complex_weights(adaptive):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    check(Fourier, losses_of, (x, torch.arange(8) % 3), dtype=None, adaptive=adaptive)


@pytest.mark.parametrize("norm", ["masked", "estimated", "full"])
def test_adaptive_perturbations_of_complex_weights_match_the_core(norm):
    torch.manual_seed(3)
    model = nn.ParameterDict({n: torch.randn(4, dtype=torch.complex128) for n in "ab"})
    x = torch.randn(6, 4, dtype=torch.complex128)
    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        rho=0.5,
        perturb=Bernoulli(0.5),
        gamma=1.0,
        adaptive=True,
        norm=norm,
    )
    seen = []

    def losses(x):
        seen.append([p.detach().clone() for p in model.values()])
        return (x * model["a"] - model["b"]).abs().square().sum(1)

    gradients = torch.autograd.grad(losses(x).mean(), list(model.values()))
    seen.clear()
    mask = []
    while sum(mask) != 1:  # one of the two is perturbed; the other only counts for "full"
        seen.clear()
        report = optimizer.backward(losses, x)
        mask = [name in report.perturbed for name in "ab"]
    theta, perturbed = seen
    epsilon = perturbations(
        [g.numpy() if m or norm == "full" else None for g, m in zip(gradients, mask, strict=True)],
        [p.numpy() for p in theta],
        [2.0 * m for m in mask],
        rho=[0.5, 0.5],
        norm=norm,
        adaptive=[True, True],
    )
    for before, after, wanted in zip(theta, perturbed, epsilon, strict=True):
        torch.testing.assert_close(after - before, torch.from_numpy(wanted))


def test_weights_of_several_types():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8).double(), nn.Tanh(), nn.Linear(8, 3))
    start = copy.deepcopy(model.state_dict())

    def losses(x, y):
        return F.cross_entropy(model[2](model[1](model[0](x)).float()), y, reduction="none")

    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.2, perturb=Everything()
    )
    x = torch.randn(6, 4, dtype=torch.float64)
    report = optimizer.step(losses, x, torch.arange(6) % 3)
    assert float(report.perturbation_norm) == pytest.approx(0.2, rel=1e-5)
    same(model.state_dict(), start, "weights")


def test_parameters_of_no_size_and_no_dimension():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) * self.scale + self.empty.sum()

    torch.manual_seed(0)
    model = Odd()
    for perturb in (Everything(), Bernoulli(0.5, unit="weight")):
        for mode in ("propagate", "skip"):
            optimizer = ESAM(sgd(model), model, rho=0.1, perturb=perturb, on_nonfinite=mode)
            optimizer.step(losses_of(model), torch.randn(6, 4), torch.arange(6) % 3)


@pytest.mark.parametrize("seen_many_times", [True, False])
def test_one_gradient_for_two_parameters(seen_many_times):
    """autograd may return the same tensor twice, and expanded tensors."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(4))
            self.b = nn.Parameter(torch.ones(4))

        def forward(self, x):
            added = self.a + self.b
            return x * (added.sum() if seen_many_times else (added * torch.ones(4)).sum())

    model = Sum()
    optimizer = ESAM(
        torch.optim.SGD(model.parameters(), lr=1.0), model, rho=1.0, perturb=Everything(), gamma=1.0
    )
    seen = []

    def losses(x):
        seen.append((model.a.detach().clone(), model.b.detach().clone()))
        return model(x)

    optimizer.backward(losses, torch.ones(2))
    step = torch.full((4,), 8.0**-0.5)
    torch.testing.assert_close(seen[1], (step, 1.0 + step))


# -- losses that exist only as a batch mean ---------------------------------------------------


def test_auxiliary_terms_are_added_to_every_sample():
    """A penalty of the whole batch: mean_i(l_i + a) is mean_i(l_i) + a, and selection ignores a."""
    model, twin = net(dropout=0.0).double(), net(dropout=0.0).double()
    x, y = batch()
    x = x.double()
    plain = ESAM(sgd(twin), twin, rho=1e-6, perturb=Everything(), gamma=0.5)
    optimizer = ESAM(sgd(model), model, rho=1e-6, perturb=Everything(), gamma=0.5)
    penalised = optimizer.backward(
        lambda x, y: losses_of(model)(x, y) + 0.1 * model.head.weight.square().sum(), x, y
    )
    other = plain.backward(losses_of(twin), x, y)
    extra = 0.1 * model.head.weight.detach().square().sum()
    torch.testing.assert_close(penalised.losses, other.losses + extra)
    difference = model.head.weight.grad - twin.head.weight.grad
    torch.testing.assert_close(difference, 0.2 * model.head.weight.detach(), atol=1e-4, rtol=1e-3)


def test_suffix_of_a_transformer_with_a_dictionary():
    """Blocks and a dictionary together give the same result as a mask without blocks."""
    torch.manual_seed(0)
    model = Encoder(tied=False)
    twin = copy.deepcopy(model)
    cut = ESAM(sgd(model), model, rho=0.2, perturb=Suffix("norm"))
    whole = ESAM(sgd(twin), twin, rho=0.2, perturb=Only(lambda u: u.name[:4] in ("norm", "deco")))
    for seed in range(3):
        torch.manual_seed(seed)
        a = cut.step(token_losses(model), tokens())
        torch.manual_seed(seed)
        b = whole.step(token_losses(twin), tokens())
        assert a.perturbed == b.perturbed
        same(model.state_dict(), twin.state_dict(), f"step {seed}")
