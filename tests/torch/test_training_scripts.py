"""Other parts of training scripts: accumulation, clipping, schedulers, groups."""

import copy
import inspect

import pytest
import torch
from tests.torch.scene import batch, losses_of, net, same, sgd
from torch import nn
from torch.optim import lr_scheduler

from esam_torch import ESAM, Bernoulli, Every, Everything, Random, Suffix


def esam(model, base=None, **kwargs):
    return ESAM(base or sgd(model), model, **{"rho": 0.1, "beta": 0.6, "gamma": 0.5, **kwargs})


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


# -- accumulation ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}, {"beta": None, "perturb": Every(2)}])
def test_each_micro_batch_has_its_own_perturbation_and_gradients_add(options):
    """m-sharpness: the sum of each micro-batch's own gradient, each with its own mask."""
    model, alone = net(), net()
    optimizer, single = esam(model, **options), esam(alone, **options)
    torch.manual_seed(2)
    masks = [optimizer.backward(losses_of(model), *batch(seed=seed)).perturbed for seed in range(3)]
    torch.manual_seed(2)
    total = None
    for seed in range(3):
        single.zero_grad()
        single.backward(losses_of(alone), *batch(seed=seed))
        found = gradients(alone)
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    same(gradients(model), total, "sum of the gradients")
    assert len(set(masks)) > 1 or options == {"gamma": 1.0}
    assert optimizer.count == 3


def test_accumulation_differs_from_the_whole_batch():
    """Accumulation is *not* one perturbation for the whole batch."""
    model, whole = net(dropout=0.0), net(dropout=0.0)
    x, y = batch(16)
    parts, one = esam(model, rho=0.5, beta=1.0, gamma=1.0), esam(whole, rho=0.5, beta=1.0, gamma=1)
    model.norm.eval()
    whole.norm.eval()
    for half in (slice(0, 8), slice(8, 16)):
        parts.backward(lambda x, y: losses_of(model)(x, y) / 2, x[half], y[half])
    one.backward(losses_of(whole), x, y)
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, whole))
    assert 1e-4 < (a - b).norm() / b.norm() < 0.5


def test_dividing_the_losses_does_not_change_the_perturbation():
    """Dividing by the number of micro-batches changes only the gradient, not the radius."""
    model, quarter = net(dropout=0.0), net(dropout=0.0)
    optimizer, other = esam(model), esam(quarter)
    report = optimizer.backward(losses_of(model), *batch())
    halved = other.backward(lambda x, y: losses_of(quarter)(x, y) / 4, *batch())
    assert torch.allclose(halved.perturbation_norm, report.perturbation_norm)
    for p, q in zip(model.parameters(), quarter.parameters(), strict=True):
        assert torch.allclose(p.grad / 4, q.grad, atol=1e-7)


def test_clipping_between_backward_and_step():
    model = net()
    optimizer = esam(model, torch.optim.SGD(model.parameters(), lr=1.0))
    start = [p.detach().clone() for p in model.parameters()]
    for seed in range(2):
        optimizer.backward(losses_of(model), *batch(seed=seed))
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
    length = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert length > 0.01
    optimizer.step()
    rows = zip(model.parameters(), start, strict=True)
    moved = torch.cat([(p.detach() - s).flatten() for p, s in rows])
    assert moved.norm() == pytest.approx(0.01, rel=1e-3)


def test_existing_gradients_are_kept():
    """After an auxiliary loss.backward(), both gradients are in `.grad`."""
    model, twin = net(), net()
    optimizer, other = esam(model), esam(twin)
    model.head.weight.square().sum().backward()
    torch.manual_seed(4)
    optimizer.backward(losses_of(model), *batch())
    torch.manual_seed(4)
    other.backward(losses_of(twin), *batch())
    extra = 2.0 * twin.head.weight.detach()
    assert torch.allclose(model.head.weight.grad, twin.head.weight.grad + extra)
    assert torch.equal(model.conv.weight.grad, twin.conv.weight.grad)


# -- schedulers --------------------------------------------------------------------------------

MAKERS = {
    "LambdaLR": lambda s, o: s(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda s, o: s(o, lambda _: 0.9),
    "StepLR": lambda s, o: s(o, 2),
    "MultiStepLR": lambda s, o: s(o, [1, 3]),
    "ConstantLR": lambda s, o: s(o, total_iters=3),
    "LinearLR": lambda s, o: s(o, total_iters=3),
    "ExponentialLR": lambda s, o: s(o, 0.9),
    "SequentialLR": lambda s, o: s(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda s, o: s(o, 4),
    "ChainedScheduler": lambda s, o: s(
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda s, o: s(o, patience=0),
    "CyclicLR": lambda s, o: s(o, 0.01, 0.1, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda s, o: s(o, 2),
    "OneCycleLR": lambda s, o: s(o, 0.1, total_steps=10),
    "PolynomialLR": lambda s, o: s(o, total_iters=4),
}


def every_scheduler():
    """Return the names of all schedulers of this torch version: new ones need a row above."""
    return sorted(
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls)
        and issubclass(cls, lr_scheduler.LRScheduler)
        and cls is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    )


def test_a_scheduler_of_the_base_optimizer():
    """It is created before ESAM, as in a script that gets it from elsewhere."""
    model = net()
    base = sgd(model)
    scheduler = lr_scheduler.ExponentialLR(base, 0.5)
    optimizer = esam(model, base)
    for seed in range(3):
        optimizer.step(losses_of(model), *batch(seed=seed))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3


def test_swalr():
    """The only scheduler in another module of torch."""
    model = net()
    optimizer = esam(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    for seed in range(3):
        optimizer.step(losses_of(model), *batch(seed=seed))
        averaged.update_parameters(model)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize("whole", [False, True], ids=["backward", "step(losses)"])
# In torch 2.6, SequentialLR itself passes an epoch to its schedulers.
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning:torch.optim.lr_scheduler")
@pytest.mark.parametrize("name", every_scheduler())
def test_every_scheduler_without_a_warning(name, whole):
    """Learning rates (and momenta) equal those with the base optimizer. Warnings are errors."""
    scheduler_class = getattr(lr_scheduler, name)
    rows = []
    for wrapped in (False, True):
        model = net()
        optimizer = esam(model) if wrapped else sgd(model)
        scheduler = MAKERS[name](scheduler_class, optimizer)
        seen = []
        for seed in range(6):
            if not wrapped:
                optimizer.zero_grad()
                losses_of(model)(*batch(seed=seed)).mean().backward()
                optimizer.step()
            elif whole:
                optimizer.step(losses_of(model), *batch(seed=seed))
            else:
                optimizer.zero_grad()
                optimizer.backward(losses_of(model), *batch(seed=seed))
                optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = optimizer.param_groups[0]
            seen.append((group["lr"], group["momentum"]))
        rows.append(seen)
    assert rows[1] == rows[0]
    assert len(set(rows[1])) > 1 or name == "ConstantLR"


def test_schedulers_still_warn_about_a_missing_step():
    """The schedulers' warning about the order of calls is still issued."""
    model = net()
    scheduler = lr_scheduler.StepLR(esam(model), 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()


def test_step_hooks_and_the_profiler_run_once_per_step():
    model = net()
    optimizer = esam(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("base"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(losses_of(model), *batch())
    assert calls == ["before", "base", "after"]


# -- groups ------------------------------------------------------------------------------------


def test_param_groups_are_the_base_optimizers():
    model = net()
    base = sgd(model)
    optimizer = esam(model, base)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults == base.defaults


def climb(optimizer, model, data):
    """Return epsilon by name, as in the last pass, and the report."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []

    def losses(x, y):
        seen.append({n: p.detach() - start[n] for n, p in model.named_parameters()})
        return losses_of(model)(x, y)

    report = optimizer.backward(losses, *data)
    return seen[-1], report


def test_each_group_has_its_own_radius_and_kind():
    model = net(dropout=0.0).double()
    x, y = batch()
    groups = [
        {"params": list(model.conv.parameters()), "esam_rho": 0.5},
        {"params": list(model.norm.parameters()), "esam_perturb": False},
        {"params": list(model.hidden.parameters()), "esam_adaptive": True},
        {"params": list(model.head.parameters()), "esam_rho": 0.0},
    ]
    optimizer = esam(model, torch.optim.SGD(groups, lr=0.1), beta=1.0)
    epsilon, report = climb(optimizer, model, (x.double(), y))
    assert report.perturbed == ("conv.weight", "hidden.weight", "hidden.bias")
    assert all(not epsilon[n].any() for n in ("norm.weight", "norm.bias", "head.weight"))

    wanted = net(dropout=0.0).double()
    losses_of(wanted)(x.double(), y).mean().backward()
    hidden = wanted.hidden
    stretched = [hidden.weight.abs() * hidden.weight.grad, hidden.bias.abs() * hidden.bias.grad]
    length = torch.cat([t.flatten() for t in (wanted.conv.weight.grad, *stretched)]).norm()
    assert torch.allclose(epsilon["conv.weight"], 0.5 * wanted.conv.weight.grad / length)
    assert torch.allclose(
        epsilon["hidden.weight"], 0.1 * hidden.weight.square() * hidden.weight.grad / length
    )
    assert torch.allclose(report.gradient_norm, length)


def test_a_rho_schedule():
    """Like lr, rho is an option of a group: a schedule sets it, and the next step uses it."""
    model = net(dropout=0.0)
    optimizer = esam(model, beta=1.0)
    for t in range(4):
        for group in optimizer.param_groups:
            group["esam_rho"] = 0.1 * t
        report = optimizer.step(losses_of(model), *batch(seed=t))
        assert float(report.perturbation_norm) == pytest.approx(0.1 * t, rel=1e-4)
        assert (report.perturbed == ()) == (t == 0)


def test_add_param_group():
    model = net()
    optimizer = esam(model, sgd(model.head), beta=1.0)
    optimizer.step(losses_of(model), *batch())
    start = model.conv.weight.detach().clone()
    optimizer.add_param_group({"params": model.conv.parameters(), "lr": 0.5, "esam_rho": 0.2})
    report = optimizer.step(losses_of(model), *batch())
    assert report.perturbed == ("conv.weight", "head.weight", "head.bias")
    assert not torch.equal(model.conv.weight, start)
    assert optimizer.param_groups[1]["momentum"] == 0.9


def test_how_parameters_are_grouped_does_not_change_masks():
    masks = []
    for grouping in (
        lambda m: [{"params": list(m.parameters())}],
        lambda m: [{"params": [p]} for p in reversed(list(m.parameters()))],
    ):
        model = net()
        optimizer = esam(model, torch.optim.SGD(grouping(model), lr=0.1))
        masks.append([optimizer.step(losses_of(model), *batch(seed=t)).perturbed for t in range(5)])
    assert masks[0] == masks[1]


def test_adadeltas_rho_is_not_changed():
    model = net()
    base = torch.optim.Adadelta(model.parameters(), lr=0.5, rho=0.8)
    optimizer = esam(model, base, rho=0.1, beta=1.0)
    report = optimizer.step(losses_of(model), *batch())
    assert base.param_groups[0]["rho"] == 0.8
    assert float(report.perturbation_norm) == pytest.approx(0.1, rel=1e-4)


# -- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_deep_copy_trains_on_its_own(scheduled):
    model = net()
    optimizer = esam(model, select=Random(0.5), gamma=None)
    if scheduled:
        lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(losses_of(model), *batch())
    twin = copy.deepcopy(optimizer)
    frozen = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    twin.step(losses_of(twin.model), *batch(seed=5))
    same(model.state_dict(), frozen, "the original's weights")
    torch.manual_seed(1)
    optimizer.step(losses_of(model), *batch(seed=5))
    same(twin.model.state_dict(), model.state_dict(), "the same step")


def test_repr():
    model = net()
    optimizer = ESAM(sgd(model), model, perturb=Bernoulli(0.5), select=Random(0.25))
    assert "ESAM(SGD, rho=0.05, perturb=Bernoulli(beta=0.5" in repr(optimizer)
    assert "Random(gamma=0.25), ascend=Batch()" in repr(optimizer)


def test_everything_by_keyword():
    """Keyword tensors are sliced like positional ones."""
    model, twin = net(), net()
    optimizer, other = esam(model), esam(twin)
    x, y = batch()
    a = optimizer.step(losses_of(model), inputs=x, targets=y)
    torch.manual_seed(0)
    net()
    b = other.step(losses_of(twin), x, y)
    assert a.indices.tolist() == b.indices.tolist()
    assert a.perturbed == b.perturbed


def test_everything_is_sam():
    """gamma = 1 and beta = 1 with b = 1 is also SAM, including BatchNorm in training mode."""
    model = net(dropout=0.0)
    optimizer = ESAM(sgd(model), model, rho=0.1, perturb=Everything(), gamma=1.0)
    x, y = batch(1)
    twin = net(dropout=0.0)
    losses_of(twin)(x, y).mean().backward()
    length = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    with torch.no_grad():
        for p in twin.parameters():
            p += 0.1 * p.grad / length
    twin.zero_grad()
    losses_of(twin)(x, y).mean().backward()
    report = optimizer.backward(losses_of(model), x, y)
    assert report.sample_share == 1.0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_a_layout_belongs_to_a_device():
    """`plan` and steps may run before the model moves to a GPU."""
    model = net()
    optimizer = ESAM(sgd(model), model, perturb=Suffix(0.5))
    optimizer.step(losses_of(model), *batch())
    layout = optimizer._run._layout
    assert layout.holds(model, optimizer.param_groups)
    object.__setattr__(layout, "device", torch.device("cuda"))  # as if it had been found there
    assert not layout.holds(model, optimizer.param_groups)
