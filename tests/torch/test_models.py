"""Models of all kinds, each compared with a hand-written step."""

import copy

import pytest
import torch
from tests.torch.by_hand import check
from tests.torch.scene import batch, losses_of, net, sgd
from torch import nn
from torch.nn import functional as F

from esam_core import ESAMValueError
from esam_torch import ESAM, Everything, Momentum, Part, Previous, Random, TopLoss


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
    layers = len(modes) // 5  # the second and third forward compare the losses
    expected = [True, False, False, True, False]
    assert modes == [mode for mode in expected for _ in range(layers)]
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
