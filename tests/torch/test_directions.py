"""`ascend=`: ascent directions, in plain torch loops and with torch's tools."""

import itertools

import pytest
import torch
from tests.torch.climbs import SELECTORS, SOURCES, by_hand, make, plain, rows, train
from tests.torch.networks import ResNet, Transformer, flops, images, tokens
from tests.torch.scene import SUFFIX_PART, Snapshot, batch, losses_of, net, sgd
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_core.cost import expected_cost
from esam_torch import (
    ESAM,
    All,
    Bernoulli,
    Every,
    Everything,
    Momentum,
    Only,
    Part,
    Previous,
    Random,
    RandomSuffix,
    Rows,
    SideBySide,
    Suffix,
    TopIncrease,
    TopLoss,
)
from esam_torch.devices import devices_of

SAMPLERS = (
    Everything(),
    Bernoulli(0.5),
    Bernoulli(0.5, unit="weight"),
    Suffix("hidden"),
    RandomSuffix(("norm", "hidden")),
    Only("norm"),
    Every(2, scale_rho=True),
)
NORMS = ("masked", "estimated", "full", "none")


# -- combinations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
@pytest.mark.parametrize("perturb", SAMPLERS, ids=repr)
def test_each_combination_restores_the_weights_and_makes_progress(perturb, ascend):
    """For every sampler, selector and norm: a backward does not change theta, flags and modes."""
    for i, (select, norm) in enumerate(itertools.product(SELECTORS, NORMS)):
        model, optimizer, losses = make(
            perturb=perturb, gamma=None, select=select, norm=norm, ascend=ascend, adaptive=i % 2 > 0
        )
        train(model, optimizer, losses, steps=2)
        before = Snapshot(model)
        optimizer.zero_grad()
        optimizer.loss(losses, *batch(seed=7)).backward()
        before.check(but=("gradients", "buffers", "random"))
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        report = optimizer.report
        if perturb.draw(optimizer._run._layout.units, seed=0, count=2).active:
            assert report.perturbation_norm > 0
            assert report.sample_share == (1.0 if select == All() else 0.5)


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_it_differs_from_the_batch_gradient(ascend):
    """A test that the whole batch's direction passes would not be a test of this direction."""
    model, optimizer, losses = make(ascend=ascend)
    other, whole, same_losses = make()
    train(model, optimizer, losses)
    train(other, whole, same_losses)
    assert (model.head.weight - other.head.weight).abs().max() > 1e-5


def test_groups_have_their_own_radius():
    for ascend in SOURCES:
        model = net(dropout=0.0)
        groups = [
            {"params": model.head.parameters(), "esam_rho": 0.3},
            {"params": model.hidden.parameters(), "esam_perturb": False},
            {"params": [*model.conv.parameters(), *model.norm.parameters()]},
        ]
        optimizer = ESAM(
            torch.optim.SGD(groups, lr=0.1, momentum=0.9),
            model,
            rho=0.1,
            perturb=Everything(),
            gamma=1.0,
            ascend=ascend,
        )
        train(model, optimizer, losses_of(model))
        if ascend == Previous():
            kept = set(optimizer.state_dict()["esam"]["direction"])
            assert kept == {n for n, _ in model.named_parameters() if "hidden" not in n}
        names = set(optimizer.report.perturbed)
        assert names == {n for n, _ in model.named_parameters() if "hidden" not in n}


# -- what a direction is --------------------------------------------------------------------------


def test_the_direction_after_accumulation_is_the_gradient_of_the_update():
    """Two batches per update, clipped: the direction is the base optimizer's gradient."""
    model, losses = plain()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, rho=0.2, beta=1.0, gamma=1.0, ascend=Previous(), norm_eps=1e-30)
    given = None
    for update in range(3):
        optimizer.zero_grad()
        wanted = [torch.zeros_like(p) for p in model.parameters()]
        for i in range(2):
            found = rows(10 * update + i)
            if given is None:
                part = torch.autograd.grad(losses(*found).mean(), list(model.parameters()))
            else:
                part = by_hand(model, losses, given, found, 0.2)
            wanted = [w + g / 2 for w, g in zip(wanted, part, strict=True)]
            (optimizer.loss(losses, *found) / 2).backward()
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, w, rtol=1e-10, atol=1e-12)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        given = [p.grad.clone() for p in model.parameters()]
        optimizer.step()


def test_changes_of_gradients_by_the_base_optimizer_do_not_affect_the_direction():
    """SGD with Nesterov momentum writes into `.grad` in its multi-tensor implementation."""
    model, losses = plain()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    optimizer = ESAM(base, model, rho=0.2, beta=1.0, gamma=1.0, ascend=Previous())
    for i in range(2):
        optimizer.zero_grad()
        optimizer.loss(losses, *rows(i)).backward()
        given = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    kept = optimizer.state_dict()["esam"]["direction"]
    for (name, _), g in zip(model.named_parameters(), given, strict=True):
        assert torch.equal(kept[name], g)


def test_the_direction_of_a_replaced_head_is_not_used():
    """Another parameter has its name; its shape may even broadcast."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
    losses = lambda x: model(x).square().mean(1)  # noqa: E731
    optimizer = ESAM(sgd(model), model, rho=0.2, beta=1.0, gamma=1.0, ascend=Previous())
    optimizer.step(losses, torch.randn(8, 4))
    optimizer.param_groups[0]["params"] = list(model[:1].parameters())
    model[1] = nn.Linear(6, 5)
    optimizer.param_groups[0]["params"] += list(model[1].parameters())
    before = model[1].weight.detach().clone()
    seen = []
    model[1].register_forward_pre_hook(lambda m, _: seen.append(m.weight.detach().clone()))
    optimizer.backward(losses, torch.randn(8, 4))
    assert len(seen) == 1 and torch.equal(seen[0], before)


BASES = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=0.01),
}


@pytest.mark.parametrize("name", BASES)
def test_momentum_reads_the_base_optimizers_first_moment(name):
    model, losses = plain()
    optimizer = ESAM(BASES[name](model), model, rho=0.2, beta=1.0, gamma=1.0, ascend=Momentum())
    for i in range(4):
        state = optimizer.base_optimizer.state
        moments = [
            state[p].get("exp_avg", state[p].get("momentum_buffer")) if p in state else None
            for p in model.parameters()
        ]
        if i == 0:
            wanted = torch.autograd.grad(losses(*rows(i)).mean(), list(model.parameters()))
        else:
            wanted = by_hand(model, losses, [-m for m in moments], rows(i), 0.2)
        optimizer.zero_grad()
        optimizer.loss(losses, *rows(i)).backward()
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, w, rtol=1e-10, atol=1e-12)
        optimizer.step()
    assert "direction" not in optimizer.state_dict()["esam"]


def test_momentum_of_optimizers_side_by_side():
    model, losses = plain()
    base = SideBySide(
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(model[2].parameters(), lr=0.01),
    )
    optimizer = ESAM(base, model, rho=0.2, beta=1.0, gamma=1.0, ascend=Momentum())
    for i in range(2):
        optimizer.step(losses, *rows(i))
    assert len(optimizer.report.perturbed) == 4


@pytest.mark.parametrize(
    ("base", "named"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "SGD with momentum=0"),
        (lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9), "RMSprop"),
        (lambda m: torch.optim.Adagrad(m.parameters()), "Adagrad"),
        (lambda m: torch.optim.Rprop(m.parameters()), "Rprop"),
        (
            lambda m: SideBySide(
                torch.optim.SGD(m[0].parameters(), lr=0.1),
                torch.optim.AdamW(m[2].parameters()),
            ),
            "SGD with momentum=0",
        ),
    ],
)
def test_a_base_without_a_first_moment_is_refused(base, named):
    model, _ = plain()
    with pytest.raises(ESAMValueError, match=rf"ascend=Momentum\(\).* Received: {named}\."):
        ESAM(base(model), model, ascend=Momentum())


def test_an_unknown_base_without_a_first_moment_is_refused_in_the_first_perturbed_step():
    class Signs(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.01})

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data -= group["lr"] * p.grad.sign()
                    self.state[p]["seen"] = True

    model, losses = plain()
    optimizer = ESAM(Signs(model.parameters()), model, ascend=Momentum())
    optimizer.step(losses, *rows(0))
    with pytest.raises(ESAMTypeError, match=r"Received: Signs, which keeps seen\."):
        optimizer.step(losses, *rows(1))


# -- what it costs --------------------------------------------------------------------------------

COSTS = (
    (Everything(), All(), Part(0.25), 1.25),
    (Suffix(0.5), All(), Part(0.25), 1.17),
    (Everything(), Random(0.5), Part(0.5), 1.00),
    (Everything(), All(), Previous(), 1.00),
    (Everything(), All(), Momentum(), 1.00),
    (Everything(), Random(0.5), Previous(), 0.50),
    (Everything(), TopLoss(0.5), Part(0.25), 1.00),
    (Everything(), TopIncrease(0.5), Previous(), 1.17),
)


@pytest.mark.parametrize(("perturb", "select", "ascend", "ratio"), COSTS, ids=str)
@pytest.mark.parametrize("kind", ["ResNet-18", "ViT"])
def test_operations_are_those_of_the_cost_model(kind, perturb, select, ascend, ratio):
    if kind == "ResNet-18":
        model, data = ResNet(width=16, dropout=0.0), images(8)
        blocks = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "head"]
    else:
        model, data, blocks = Transformer(), tokens(8), None
    measure = ESAM(torch.optim.SGD(model.parameters(), lr=0.01), model, blocks=blocks)
    units = measure.measured_units(losses_of(model), *data)
    predicted = expected_cost(perturb, units, select, ascend=ascend, batch_size=8).ratio
    if kind == "ResNet-18":
        assert predicted == pytest.approx(ratio, abs=0.02)
    options = {"perturb": perturb, "select": select, "ascend": ascend, "momentum": 0.9}
    counted = flops(model, data, **options) / flops(model, data, rho=0.0)
    assert counted == pytest.approx(predicted, rel=0.02)


def test_the_samples_are_counted_once():
    """The first step counts them and compares losses; later steps need no extra forward."""
    _, optimizer, losses = make(ascend=Part(0.25))
    seen = []

    def watched(x, y):
        seen.append(len(y))
        return losses(x, y)

    for b in (8, 8, 4, 12):
        seen.clear()
        optimizer.step(watched, *batch(b))
        assert seen == ([8, 2, 8, 2, 8] if optimizer.count == 1 else [b // 4, b])


def test_a_marked_batch_needs_no_counting_and_no_comparison():
    _, optimizer, losses = make(ascend=Part(0.25))
    seen = []

    def watched(x, y):
        seen.append(len(y))
        return losses(x, y)

    x, y = batch(8)
    optimizer.step(watched, Rows(x), Rows(y))
    assert seen == [2, 8]


@pytest.mark.parametrize("mark", [Rows, lambda x: x], ids=["marked", "plain"])
def test_a_part_of_a_marked_batch_is_read_like_that_of_any_other(mark):
    """A table of ten numbers is passed whole, also in a last batch of ten samples."""
    torch.manual_seed(0)
    model, weights, seen = nn.Linear(4, 3), torch.arange(1.0, 11.0), []

    def losses(x, y, weights):
        seen.append(len(weights))
        return nn.functional.cross_entropy(model(x), y, reduction="none") * weights[y]

    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, **SUFFIX_PART)
    for b in (16, 16, 10):
        optimizer.step(losses, mark(torch.randn(b, 4)), torch.randint(3, (b,)), weights)
    assert set(seen) == {10}


def test_directions_move_the_weights_of_the_selected_samples_to_their_losses():
    """As in a model on several GPUs: losses on another device than the perturbed weights."""
    linear = nn.Linear(4, 1)
    base = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
    optimizer = ESAM(base, linear, select=Random(0.5), ascend=Momentum())
    linear(torch.ones(2, 4)).sum().backward()
    base.step()

    def losses(x):
        return _OnMeta.apply(linear(x).flatten())

    assert optimizer.loss(losses, Rows(torch.randn(8, 4))).device.type == "meta"


class _OnMeta(torch.autograd.Function):
    """Moves losses to the meta device, without values."""

    @staticmethod
    def forward(ctx, values):
        return values.to("meta")

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(gradient.shape)


def test_a_budget_is_applied_with_the_given_direction():
    model = ResNet(width=4, dropout=0.0)
    optimizer = ESAM(sgd(model), model, budget=1.25, ascend=Part(0.25))
    optimizer.step(losses_of(model), *images(8))
    assert optimizer.plan().chosen.perturb == Everything()
    assert "ascend=Part(share=0.25)" in str(optimizer.plan())


@pytest.mark.parametrize("ascend", [Part(0.25), Previous()], ids=repr)
def test_an_optional_argument_may_be_missing_from_some_batches(ascend):
    model = net()
    optimizer = ESAM(sgd(model), model, select=Random(0.5), ascend=ascend, perturb=Everything())
    losses = losses_of(model)

    def masked(x, y, mask=None):
        values = losses(x, y)
        return values if mask is None else values * mask

    x, y = batch()
    for mask in (torch.ones(8), torch.ones(8), None, torch.ones(8)):
        optimizer.step(masked, x, y, mask)
    assert optimizer.count == 4


def test_the_devices_of_data_parallel_copies_are_known():
    """Their generators draw the dropout masks of their rows."""
    copies = nn.DataParallel(nn.Linear(2, 2))
    assert devices_of(copies) == [torch.device("cpu")]
    copies.device_ids, copies.src_device_obj = [0, 1], torch.device("cuda", 0)
    assert devices_of(nn.Sequential(copies)) == [
        torch.device(d) for d in ("cpu", "cuda:0", "cuda:1")
    ]
