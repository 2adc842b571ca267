"""Buffers, parametrisations, and parameters of every kind."""

import copy

import pytest
import torch
from tests.torch.by_hand import check
from tests.torch.scene import losses_of, same, sgd
from torch import nn
from torch.nn import functional as F

from esam_core.perturbation import perturbations
from esam_torch import ESAM, Bernoulli, Everything, Suffix


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


@pytest.mark.parametrize(
    "options", [{"perturb": Suffix(0.5), "gamma": 1.0}, {"budget": 1.9}], ids=str
)
def test_parameters_without_elements(options):
    """As of a layer for a table without such columns."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.numbers, self.columns = nn.Linear(4, 4), nn.Parameter(torch.zeros(0, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.numbers(x)) + self.columns.sum(0))

    model = Table()
    optimizer = ESAM(sgd(model), model, **options)
    assert optimizer.step(losses_of(model), torch.randn(6, 4), torch.arange(6) % 3).perturbed


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_hooks_compute_do_not_end_pruning(norm):
    """They are attributes with a graph, but no terms that a script would add to the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(4, 8)), nn.Tanh(), norm(nn.Linear(8, 3)))
    optimizer = ESAM(sgd(model), model, rho=0.1, perturb=Suffix("2"), gamma=1.0)
    for _ in range(4):  # warnings are errors
        optimizer.step(losses_of(model), torch.randn(6, 4), torch.arange(6) % 3)
