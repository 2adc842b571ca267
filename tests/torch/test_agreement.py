"""The warning for losses that depend on other samples: when it is and is not issued."""

import pytest
import torch
from tests.torch.coupled import X, Y, Z, cross_entropy, info_nce, mixup, said
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Between, Everything, Part
from esam_torch.agreement import comparable, disagreement, noisy_layers

# -- losses that depend on the other samples -------------------------------------------------------


def advantages(model, x, rewards):
    advantage = (rewards - rewards.mean()) / rewards.std()
    return -advantage * F.log_softmax(model(x), 1)[:, 0]


def prototypes(model, x, y):
    out = model(x)
    means = torch.stack([out[y == c].mean(0) if (y == c).any() else out[0] for c in range(4)])
    return F.cross_entropy(-torch.cdist(out, means), y, reduction="none")


def decorrelation(model, x, y):
    return cross_entropy(model, x, y) + 5.0 * model(x).std(0).mean()


def misread_weights(model, x, y, weights):
    return cross_entropy(model, x, y) * weights[y]


COUPLED = {
    "InfoNCE": (info_nce, X, Z),
    "normalised advantages": (advantages, X, Z[:, 0]),
    "prototypes": (prototypes, X, Y),
    "a penalty of the batch": (decorrelation, X, Y),
    "a table that is no sample's": (misread_weights, X, Y, Z[:, 0].exp()),
    "under a large constant": (lambda m, *b: prototypes(m, *b) + 60.0, X, Y),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_losses_that_depend_on_the_other_samples(kind):
    losses, *batch = COUPLED[kind]
    text = said(losses, *batch, gamma=0.25)
    assert text is not None and text.startswith("`losses` must give a sample the same loss")
    for word in ("The last 4 samples had", "InfoNCE", "gamma=1.0", "Rows(x)", "Whole(x)"):
        assert word in text


@pytest.mark.parametrize("options", [{"gamma": 0.5}, {"gamma": 1.0, "ascend": Part(0.25)}])
def test_one_loss_for_the_whole_batch(options):
    text = said(lambda m, x, y: F.cross_entropy(m(x), y).expand(len(x)), X, Y, **options)
    assert "All samples of the batch have the same loss" in text
    assert "use gamma=1.0 without ascend=Part(...)" in text
    assert "Each is" not in text


@pytest.mark.parametrize(
    ("losses", "factor"),
    [
        (lambda m, x, y: cross_entropy(m, x, y) * len(x), "0.5"),
        (lambda m, x, y: cross_entropy(m, x, y) / len(x), "2"),
        (lambda m, x, y: -cross_entropy(m, x, y) * len(x), "0.5"),
    ],
    ids=["times", "divided", "negative"],
)
def test_a_factor_is_named(losses, factor):
    text = said(losses, X, Y)
    assert f"Each is {factor} times the other" in text and "* len(batch)" in text
    assert "InfoNCE" not in text


# -- losses that depend only on the sample ---------------------------------------------------------


def in_bfloat16(model, x, y):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    return F.cross_entropy(8.0 * out.float(), y, reduction="none")


def confident(model, x, y):
    """Logits of 30 and losses near 0, in half precision, with the largest rounding errors."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x) + 30.0 * F.one_hot(y, 8)
    return F.cross_entropy(out.float(), y, reduction="none")


OWN = {
    "cross-entropy": (cross_entropy, X, Y),
    "with a penalty on weights": (
        lambda m, x, y: cross_entropy(m, x, y) + m[0].weight.square().sum(),
        X,
        Y,
    ),
    "tiny": (lambda m, x, y: 1e-6 * cross_entropy(m, x, y), X, Y),
    "of both signs": (lambda m, x, y: cross_entropy(m, x, y) - 2.0, X, Y),
    "in bfloat16": (in_bfloat16, X, Y),
    "confident in bfloat16": (confident, X, Y),
    "zero": (lambda m, x, y: 0.0 * cross_entropy(m, x, y), X, Y),
}


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", OWN)
def test_losses_that_depend_only_on_the_sample(kind, gamma):
    losses, *batch = OWN[kind]
    assert said(losses, *batch, gamma=gamma) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_losses_give_no_warning(value):
    losses, indices = torch.tensor([1.0, value, 3.0, 4.0]), torch.tensor([1, 3])
    assert disagreement(losses, indices, torch.tensor([2.0, 5.0])) is None


def test_the_losses_are_not_changed():
    losses, alone = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([9.0])
    assert disagreement(losses, torch.tensor([1]), alone) is not None
    assert losses.grad is None and losses.tolist() == [1.0, 2.0] and alone.tolist() == [9.0]


# -- whole steps ---------------------------------------------------------------------------------


def make(model=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh()) if model is None else model
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, ESAM(base, model, **{"rho": 0.1, "perturb": Everything(), **options})


def test_a_step_warns_once():
    model, optimizer = make()
    with pytest.warns(UserWarning, match=r"the same loss whichever other samples.*gamma=1\.0"):
        optimizer.step(lambda a, b: info_nce(model, a, b), X, Z)
    optimizer.step(lambda a, b: info_nce(model, a, b), X, Z)  # warnings are errors here


def test_a_step_warns_if_losses_draw_random_numbers():
    model, optimizer = make()
    with pytest.warns(UserWarning, match=r"draws random numbers \(mixup"):
        optimizer.step(lambda x, y: mixup(model, x, y), X, Y)


class Centred(nn.Module):
    """Subtracts the batch mean, without a telling name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean.copy_(x.detach().mean(0))
        return x - self.mean


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.5), nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False), Centred()],
    ids=["Dropout", "BatchNorm", "BatchNorm without statistics", "one's own"],
)
def test_no_warning_if_the_model_couples_samples(layer):
    model, optimizer = make(nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 4)))
    optimizer.step(lambda x, y: cross_entropy(model, x, y), X, Y)


def test_buffers_made_in_inference_mode_are_not_counted():
    with torch.inference_mode():
        table = torch.ones(4)
    model, optimizer = make()
    model.register_buffer("table", table)
    optimizer.step(lambda x, y: cross_entropy(model, x * model.table.clone(), y), X, Y)


def test_the_first_step_with_a_selection_is_compared():
    model, optimizer = make(perturb=Between(1, None))
    coupled = lambda a, b: info_nce(model, a, b)  # noqa: E731
    optimizer.step(coupled, X, Z)  # a base step
    with pytest.warns(UserWarning, match="the same loss whichever"):
        optimizer.step(coupled, X, Z)


def test_base_steps_compare_nothing(monkeypatch):
    model, optimizer = make(perturb=Between(2, None))
    monkeypatch.setattr("esam_torch.step.compare_losses", None)
    for _ in range(2):
        optimizer.step(lambda x, y: cross_entropy(model, x, y), X, Y)
    with pytest.raises(TypeError, match="NoneType"):  # the first step that perturbs
        optimizer.step(lambda x, y: cross_entropy(model, x, y), X, Y)


def test_with_every_sample_nothing_is_compared():
    model, optimizer = make(gamma=1.0)
    optimizer.step(lambda x, y: mixup(model, x, y), X, Y)


# -- models in which no comparison is possible -----------------------------------------------------


class Normalised(nn.Module):
    """A BatchNorm layer of another library."""


class BatchRenorm1d(Normalised):
    pass


class FrozenBatchNorm2d(Normalised):
    pass


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attention_dropout = dropout


MODELS = {
    "plain": (nn.Linear(2, 2), True, True),
    "LayerNorm": (nn.LayerNorm(2), True, True),
    "BatchNorm": (nn.BatchNorm2d(2), False, False),
    "a lazy BatchNorm": (nn.LazyBatchNorm1d(), False, False),
    "another library's": (BatchRenorm1d(), False, False),
    "a frozen one": (FrozenBatchNorm2d(), True, True),
    "BatchNorm in evaluation": (nn.BatchNorm2d(2).eval(), True, True),
    "Dropout": (nn.Dropout(0.1), True, False),
    "Dropout of nothing": (nn.Dropout(0.0), True, True),
    "Dropout in evaluation": (nn.Dropout(0.5).eval(), True, True),
    "DropPath": (DropPath(), True, False),
    "DropPath of nothing": (DropPath(0.0), True, True),
    "an LSTM": (nn.LSTM(2, 2, 2, dropout=0.2), True, False),
    "attention": (Attention(0.1), True, False),
    "attention without": (Attention(0.0), True, True),
    "MultiheadAttention": (nn.MultiheadAttention(2, 1, dropout=0.1), True, False),
    "RReLU": (nn.RReLU(), True, False),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_in_which_losses_are_comparable(kind):
    module, silent, drawing = MODELS[kind]
    model = nn.Sequential(nn.Linear(2, 2), module)
    model.training = True
    assert comparable(model, drew=False, wrote=False) == silent
    assert comparable(model, drew=True, wrote=False) == drawing
    assert not comparable(model, drew=False, wrote=True)
    alone = not list(module.children())
    assert noisy_layers(model) == ([] if drawing or not alone else [module])
