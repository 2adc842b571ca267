"""`budget=`: the first backward measures the model and chooses; steps cost as predicted."""

import re
import warnings

import pytest
import torch
from tests.torch.networks import ResNet, flops, images
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from esam_core import ESAMRuntimeError, ESAMValueError
from esam_core.cost import expected_cost
from esam_torch import (
    ESAM,
    All,
    Bernoulli,
    Everything,
    Only,
    Proportional,
    Suffix,
    TopIncrease,
    TopLoss,
)

# Small budgets are in question here; a test below looks at what is said about them.
pytestmark = pytest.mark.filterwarnings("ignore:budget=")


def optimizer_of(model, **options):
    return ESAM(torch.optim.SGD(model.parameters(), lr=0.01), model, **options)


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize(
    ("perturb", "select"),
    [
        (Everything(), All()),
        (Suffix("layer3"), TopIncrease(0.5)),
        (Suffix("layer3"), All()),
        (Suffix("layer4"), TopIncrease(0.5)),
        (Suffix("layer4"), TopLoss(0.5)),
        (Suffix("layer2"), Proportional(0.5)),
        (Only("norm", Suffix("layer3")), TopIncrease(0.5)),
    ],
    ids=str,
)
def test_the_cost_model_predicts_what_is_counted(perturb, select):
    model = ResNet(width=16, dropout=0.0)
    optimizer = optimizer_of(model, perturb=perturb, select=select, blocks=BLOCKS)
    units = optimizer.measured_units(losses_of(model), *images(2))
    predicted = expected_cost(perturb, units, select).ratio
    measured = flops(model, images(2), perturb=perturb, select=select)
    measured /= flops(model, images(2), rho=0.0)
    # The cost model counts a residual block's shortcut as a layer of the chain, an error of 1%.
    assert measured == pytest.approx(predicted, rel=0.015)


BLOCKS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "head"]


def test_random_masks_cost_what_is_predicted_on_average():
    model = ResNet(width=4, dropout=0.0)
    optimizer = optimizer_of(model, blocks=BLOCKS)
    units = optimizer.measured_units(losses_of(model), *images(2))
    predicted = expected_cost(Bernoulli(0.6), units, TopIncrease(0.5), start=1, steps=100).ratio
    measured = flops(model, images(2), steps=100) / flops(model, images(2), rho=0.0)
    assert measured == pytest.approx(predicted, rel=0.015)


@pytest.mark.parametrize("budget", [1.0, 1.15, 1.3, 2.0])
def test_steps_cost_no_more_than_the_budget(budget):
    model = ResNet(width=16, dropout=0.0)
    counted = flops(model, images(2), steps=24, budget=budget)
    # The cost model has an error of 1% for residual blocks with a shortcut.
    assert counted <= budget * 1.015 * flops(model, images(2), rho=0.0)


def test_plan_shows_the_choice():
    model = ResNet(dropout=0.0)
    optimizer = optimizer_of(model, budget=1.3)
    with pytest.raises(ESAMRuntimeError, match="measured model"):
        optimizer.plan()
    plan = optimizer.plan(losses_of(model), *images())
    printed = str(plan)
    assert f"{plan.chosen.perturb!r}" in printed
    assert "->" in printed
    assert optimizer.config.perturb == plan.chosen.perturb == Suffix("layer2")
    assert optimizer.config.select == Proportional(0.5)
    optimizer.step(losses_of(model), *images())
    assert optimizer.plan() is plan


def test_a_budget_that_is_too_small_warns_once():
    model = ResNet(dropout=0.0)
    optimizer = optimizer_of(model, budget=1.15)
    with pytest.warns(UserWarning, match="too small to keep all samples") as caught:
        optimizer.step(losses_of(model), *images())
    assert str(caught[0].message) == optimizer.plan().warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(losses_of(model), *images())


def test_an_applied_budget_is_in_the_checkpoint():
    model = ResNet(dropout=0.0)
    optimizer = optimizer_of(model, budget=1.15)
    fresh = optimizer.state_dict()
    optimizer.step(losses_of(model), *images())
    assert isinstance(optimizer.config.perturb, Suffix)
    state = optimizer.state_dict()
    config = optimizer.config
    for options in ({"budget": 1.15}, {"perturb": config.perturb, "select": config.select}):
        other = optimizer_of(model, **options)
        other.load_state_dict(state)  # without a warning: nothing is replaced
        assert other.config == config
        again = optimizer_of(model, **options)
        again.load_state_dict(other.state_dict())
        assert again.config == config
    other = optimizer_of(model, budget=1.15)
    other.load_state_dict(fresh)  # saved before the first backward: the budget is not applied yet
    other.backward(losses_of(model), *images())
    assert other.config == config
    optimizer.load_state_dict(fresh)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("budget", [None, 1.5])
def test_a_budget_that_a_checkpoint_replaces_is_named(budget, steps):
    model = ResNet(dropout=0.0)
    optimizer = optimizer_of(model, budget=1.15)
    for _ in range(steps):
        optimizer.step(losses_of(model), *images())
    other = optimizer_of(model, budget=budget)
    words = f"perturb={optimizer.config.perturb!r} (in code" if steps else "budget=1.15 (in code"
    with pytest.warns(UserWarning, match=re.escape(words if budget is None else "budget=1.15")):
        other.load_state_dict(optimizer.state_dict())
    assert other.config == optimizer.config


@pytest.mark.parametrize(
    "options", [{"beta": 0.5}, {"gamma": 0.5}, {"perturb": Everything()}, {"select": All()}]
)
def test_a_budget_excludes_other_settings(options):
    model = ResNet()
    with pytest.raises(ESAMValueError, match="`budget` chooses the sampler and the selector"):
        optimizer_of(model, budget=1.2, **options)


def test_bad_budgets():
    model = ResNet()
    with pytest.raises(ESAMValueError, match="`budget` must be finite and > 0"):
        optimizer_of(model, budget=-1.0)
    optimizer = optimizer_of(model, budget=0.2)
    with pytest.raises(ESAMValueError, match="`budget` must be at least"):
        optimizer.step(losses_of(model), *images())
    with pytest.raises(ESAMRuntimeError, match="needs `budget`"):
        optimizer_of(model).plan()


@pytest.mark.parametrize("held", ["everything", "the rest"])
@pytest.mark.parametrize(("frozen", "budget"), [(6, 1.2), (9, 1.3), (9, 1.5), (6, 2.0)])
def test_a_frozen_backbone_is_in_the_cost(frozen, budget, held):
    """A base step is cheaper, so the same budget allows less."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(12)))
    for layer in list(model)[:frozen]:
        layer.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad or held == "everything"]
    x, y = torch.randn(8, 32), torch.randint(32, (8,))

    def counted(**options):
        base = torch.optim.SGD(parameters, lr=0.0)
        optimizer = ESAM(base, model, **options)
        optimizer.step(losses_of(model), x, y)
        with FlopCounterMode(display=False) as counter:
            for _ in range(4):
                optimizer.step(losses_of(model), x, y)
        return optimizer, counter.get_total_flops()

    optimizer, cost = counted(budget=budget)
    _, base = counted(rho=0.0)
    assert cost / base == pytest.approx(optimizer.plan().chosen.ratio, rel=1e-3)
    assert cost <= budget * base


def test_a_budget_that_is_too_small_is_refused_in_every_step():
    """Also in a loop that catches errors, which would otherwise train with the defaults."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, budget=1.01)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(3):
        with pytest.raises(ESAMValueError, match=r"`budget` must be at least 1\.0"):
            optimizer.step(losses_of(model), x, y)
    assert optimizer.count == 0


def test_a_budget_respects_unperturbable_parameters():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(8)))
    rest = {"params": list(model[:4].parameters())}
    head = {"params": list(model[4:].parameters()), "esam_perturb": False}
    optimizer = ESAM(torch.optim.SGD([rest, head], lr=0.1), model, budget=1.9)
    x, y = torch.randn(8, 32), torch.randint(32, (8,))
    report = optimizer.step(losses_of(model), x, y)
    assert report.perturbed
    assert all(int(name[0]) < 4 for name in report.perturbed)


def test_an_applied_budget_from_a_checkpoint_has_no_plan():
    model = ResNet(dropout=0.0)
    optimizer = optimizer_of(model, budget=1.15)
    optimizer.step(losses_of(model), *images())
    other = optimizer_of(model, budget=1.15)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ESAMRuntimeError, match=r"A checkpoint has applied the budget: Suffix"):
        other.plan(losses_of(model), *images())


def test_blocks_count_with_their_frozen_weights():
    """Only biases, as in BitFit; or small adapters of frozen layers, and a head."""
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 8))
    for layer in layers:
        layer[0].weight.requires_grad_(False)

    def perturbed():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = ESAM(torch.optim.SGD(trained, lr=0.1), model, perturb=Suffix(0.6), gamma=1.0)
        x, y = torch.randn(8, 8), torch.arange(8)
        return optimizer.step(losses_of(model), x, y).perturbed

    assert perturbed() == ("2.0.bias", "3.0.bias", "4.weight", "4.bias")
    model[4].weight.requires_grad_(False)
    assert perturbed() == ("2.0.bias", "3.0.bias", "4.bias")
    model.requires_grad_(True)  # only the optimizer knows what is trained
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    optimizer = ESAM(torch.optim.SGD(biases, lr=0.1), model, perturb=Suffix(0.6), gamma=1.0)
    report = optimizer.step(losses_of(model), torch.randn(8, 8), torch.arange(8))
    assert report.perturbed == ("2.0.bias", "3.0.bias", "4.bias")
