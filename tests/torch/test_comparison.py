"""Which subsets, arguments and layers the comparison of losses sees, and what it leaves."""

import pytest
import torch
from tests.torch.coupled import X, Y, Z, cross_entropy, info_nce, mixup, noise, said
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Momentum, Part, Previous, Proportional, Random
from esam_torch import TopLoss as ByLoss


def boxes(model, x, table):
    """Several rows per sample, with the sample's number in the first column, as in YOLO."""
    out, number = model(x), table[:, 0].long()
    known = number < len(x)
    errors = (out[number[known]] - table[known, 1:]).square().mean(1)
    return torch.zeros(len(x)).index_add(0, number[known], errors)


NUMBERS = torch.cat([torch.arange(16), torch.arange(0, 16, 2)]).sort().values
TABLE = torch.cat([NUMBERS[:, None].float(), torch.linspace(-2, 2, 24 * 8).reshape(24, 8)], 1)

SUBSETS = {
    "TopIncrease": {"gamma": 0.5},
    "TopLoss": {"select": ByLoss(0.5)},
    "Proportional": {"select": Proportional(0.5)},
    "Random": {"select": Random(0.5)},
    "Part": {"gamma": 1.0, "ascend": Part(0.25)},
    "Previous": {"gamma": 0.5, "ascend": Previous()},
    "Momentum": {"select": Random(0.5), "ascend": Momentum()},
}


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_table_with_several_rows_per_sample(subset):
    text = said(boxes, X, TABLE, **SUBSETS[subset])
    assert text.startswith("`losses` must give a sample the same loss")
    assert "several rows per sample" in text
    assert "Split by sample: batch[0] (Tensor of shape (16, 4))" in text
    assert "Passed whole: batch[1] (Tensor of shape (24, 9))" in text


@pytest.mark.parametrize("subset", SUBSETS)
def test_each_kind_of_subset_is_compared(subset):
    assert "InfoNCE" in said(info_nce, X, Z, **SUBSETS[subset])
    assert said(cross_entropy, X, Y, **SUBSETS[subset]) is None


class LinearBatchNorm(nn.Sequential):
    """A block with BatchNorm in its name, whose own layers are looked at."""


class Instances(nn.InstanceNorm1d):
    def __init__(self):
        super().__init__(4, track_running_stats=True)


def counts_writes_in_evaluation():
    """Return whether torch counts a write to running statistics that are only read."""
    layer = Instances().eval()
    before = layer.running_mean._version
    layer(torch.ones(1, 4, 2))
    return layer.running_mean._version > before


@pytest.mark.parametrize(
    "model",
    [
        lambda: LinearBatchNorm(nn.Linear(4, 8), nn.BatchNorm1d(8)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)),
        pytest.param(
            lambda: nn.Sequential(
                nn.Linear(4, 8), nn.Unflatten(1, (4, 2)), Instances(), nn.Flatten()
            ),
            marks=pytest.mark.skipif(
                counts_writes_in_evaluation(), reason="this torch counts writes that do not happen"
            ),
        ),
    ],
    ids=["a block", "spectral norm", "InstanceNorm"],
)
def test_layers_that_write_are_in_evaluation_mode(model):
    assert "InfoNCE" in said(info_nce, X, Z, model=model())
    assert said(cross_entropy, X, Y, model=model()) is None


class OnlyInTraining(nn.BatchNorm1d):
    """Cannot be evaluated before a calibration."""

    def forward(self, x):
        if not self.training:
            raise ValueError("not calibrated")
        return super().forward(x)


def test_nothing_is_compared_if_that_raises_an_error():
    model = nn.Sequential(nn.Linear(4, 8), OnlyInTraining(8), nn.Linear(8, 8))
    assert said(cross_entropy, X, Y, model=model) is None
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("options", SUBSETS.values(), ids=SUBSETS)
def test_losses_that_switch_modes_leave_no_trace(options, monkeypatch):
    """As for pseudo-labels: statistics that the comparison would write are restored."""

    def losses(model, x, y):
        model.eval()
        with torch.no_grad():
            labels = model(x).argmax(1)
        model.train()
        return cross_entropy(model, x, torch.where(y > 1, labels, y))

    def state(compares):
        torch.manual_seed(0)
        model = nets()
        model[3].p = 0.0
        with monkeypatch.context() as patch:
            if not compares:
                patch.setattr("esam_torch.task.Task.compares", lambda *_: False)
            said(losses, X, Y, model=model, **options)
        return model.state_dict().values()

    assert all(map(torch.equal, state(compares=True), state(compares=False)))


def test_the_users_take_is_compared():
    first = lambda batch, indices: (batch[0][indices], batch[1][indices - 1])  # noqa: E731
    assert "selected by your `take`" in said(cross_entropy, X, Y, gamma=0.5, take=first)


def nets():
    norm, drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), drop, nn.Linear(8, 8))


def test_models_with_batchnorm_and_dropout_are_compared_in_evaluation_mode():
    assert "InfoNCE" in said(info_nce, X, Z, model=nets())
    assert "several rows" in said(boxes, X, TABLE, model=nets())
    assert said(cross_entropy, X, Y, model=nets()) is None


class Functional(nn.Module):
    """Dropout as functions, in a module whose names do not tell."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner, self.head = kind, nn.Linear(4, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = self.inner(x)
        if self.kind == "dropout":
            x = F.dropout(x, 0.5, training=self.training)
        elif self.kind == "feature dropout":
            x = F.dropout1d(x[:, :, None], training=self.training)[:, :, 0]
        elif self.kind == "attention":
            x = F.scaled_dot_product_attention(*[x[:, None]] * 3, None, 0.5)[:, 0]
        elif self.kind == "named attention":
            x = F.scaled_dot_product_attention(*[x[:, None]] * 3, dropout_p=0.5)[:, 0]
        else:
            x = self.attention(*[x[:, None]] * 3)[0][:, 0]
        return self.head(x)


@pytest.mark.parametrize("subset", ["TopIncrease", "TopLoss", "Part"])
@pytest.mark.parametrize(
    "kind", ["dropout", "feature dropout", "attention", "named attention", "a module"]
)
def test_dropout_in_functions_is_switched_off(kind, subset):
    assert said(cross_entropy, X, Y, model=Functional(kind), **SUBSETS[subset]) is None
    assert "InfoNCE" in said(info_nce, X, Z, model=Functional(kind), **SUBSETS[subset])


def test_noise_in_losses_matters_only_to_a_selection_by_losses():
    """As in a variational autoencoder: row j of a part gets the noise of row j of the batch."""
    for losses in (noise, mixup, lambda *args: mixup(*args) + 60.0):
        text = said(losses, X, Y, gamma=0.5)
        assert text.startswith("`losses` draws random numbers") and "InfoNCE" not in text
        assert "The last 8 samples had a mean loss of" in text
    assert said(noise, X, Y, gamma=1.0, ascend=Part(0.25)) is None
    assert said(noise, X, Y, select=Random(0.5)) is None


@pytest.mark.parametrize("ascend", [None, Part(0.5), Previous()])
def test_a_step_computes_the_same_with_and_without_the_comparison(ascend, monkeypatch):
    def weights(compares):
        torch.manual_seed(0)
        model = nets()
        with monkeypatch.context() as patch:
            if not compares:
                patch.setattr("esam_torch.task.Task.compares", lambda *_: False)
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            options = {} if ascend is None else {"ascend": ascend}
            optimizer = ESAM(base, model, rho=0.1, perturb=Everything(), gamma=0.5, **options)
            calls = []
            for _ in range(3):
                optimizer.step(lambda x, y: calls.append(1) or cross_entropy(model, x, y), X, Y)
        assert all(module.training for module in model.modules())
        return [*model.state_dict().values(), torch.rand(2)], len(calls)

    (with_it, more), (without, calls) = weights(True), weights(False)
    assert all(map(torch.equal, with_it, without))
    assert more == calls + 2


def test_compiled_models_are_compared_as_they_are_written():
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    frames = []

    def backend(graph, _):
        frames.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, compiled, rho=0.1, perturb=Everything(), select=ByLoss(0.5))
    with pytest.warns(UserWarning, match="InfoNCE"):
        optimizer.step(lambda a, b: info_nce(compiled, a, b), X, Z)
    before = len(frames)
    torch.compiler.reset()
    frames.clear()
    optimizer.step(lambda a, b: info_nce(compiled, a, b), X, Z)
    assert len(frames) == before  # the passes alone compile as much
