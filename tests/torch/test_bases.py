"""Base optimizers: torch's, schedulefree's, pytorch-optimizer's, `SideBySide`, and errors."""

import copy

import pytest
import torch
from tests.torch.scene import batch, losses_of, net, same
from torch import nn
from torch.optim import lr_scheduler

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch import ESAM, DistributedState, SideBySide


def matrices(model):
    return [p for p in model.parameters() if p.dim() == 2]


def others(model):
    return [p for p in model.parameters() if p.dim() != 2]


#: Muon trains only matrices. Before torch 2.9, which adds it, the tests use another optimizer.
OF_MATRICES = getattr(torch.optim, "Muon", torch.optim.RMSprop)

TORCH = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "SGD fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "SGD foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True),
    "Adam foreach": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, foreach=True),
    "Adam tensor lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "Adagrad fused": lambda m: torch.optim.Adagrad(m.parameters(), fused=True),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.1),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9, centered=True),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    f"{OF_MATRICES.__name__} beside AdamW": lambda m: SideBySide(
        OF_MATRICES(matrices(m), lr=0.02), torch.optim.AdamW(others(m), lr=0.01)
    ),
}


def base_run(make, steps):
    """Train with the base optimizer alone."""
    model = net()
    optimizer = make(model)
    torch.manual_seed(1)
    for seed in range(steps):
        optimizer.zero_grad()
        losses_of(model)(*batch(seed=seed)).mean().backward()
        optimizer.step()
    return model


def esam_run(make, steps, **kwargs):
    """Train with ESAM."""
    model = net()
    optimizer = ESAM(make(model), model, **kwargs)
    torch.manual_seed(1)
    for seed in range(steps):
        optimizer.step(losses_of(model), *batch(seed=seed))
    return model


@pytest.mark.parametrize("name", TORCH)
def test_torchs_own(name):
    """At rho = 0 training equals the base optimizer; at rho > 0 it differs and is finite."""
    plain = base_run(TORCH[name], 8)
    same(esam_run(TORCH[name], 8, rho=0.0).state_dict(), plain.state_dict(), "rho = 0")
    climbed = esam_run(TORCH[name], 8, rho=0.1)
    assert not torch.equal(climbed.head.weight, plain.head.weight)
    assert all(p.isfinite().all() for p in climbed.parameters())


def test_every_optimizer_of_torch_is_tested_or_refused():
    known = {name.split()[0] for name in TORCH} | {"Muon"}
    refused = {"LBFGS"}
    elsewhere = {"SparseAdam"}  # with sparse gradients, in test_transformer_models.py
    found = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }
    assert found - {"Optimizer"} - refused - elsewhere - known == set()


# -- schedulefree ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedulefree(name):
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")

    def make(model):
        optimizer = getattr(schedulefree, name)(model.parameters(), lr=0.05)
        optimizer.train()
        return optimizer

    same(esam_run(make, 6, rho=0.0).state_dict(), base_run(make, 6).state_dict(), "rho = 0")
    model = net()
    base = getattr(schedulefree, name)(model.parameters(), lr=0.05)
    optimizer = ESAM(base, model, rho=0.1)
    optimizer.train()
    for seed in range(8):
        optimizer.step(losses_of(model), *batch(seed=seed))
    training = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.eval()
    assert not torch.equal(model.head.weight, training["head.weight"])
    with pytest.raises(Exception, match=r"not in train mode"):
        optimizer.step(losses_of(model), *batch())
    optimizer.train()
    for n, p in model.named_parameters():
        assert torch.allclose(p, training[n], atol=1e-6)


def test_train_and_eval_do_nothing_for_other_bases():
    model = net()
    optimizer = ESAM(torch.optim.SGD(model.parameters()), model)
    optimizer.train()
    optimizer.eval()
    assert model.training


# -- pytorch-optimizer -------------------------------------------------------------------------

#: The optimizers that the documentation lists. They are tested with their defaults.
LISTED = (
    *("ADOPT", "AdaBelief", "AdaBound", "AdEMAMix", "Adai", "Adan", "AdaPNM", "AdaNorm", "Aida"),
    *("CAME", "DAdaptAdam", "DAdaptSGD", "FAdam", "Fromage", "Grams", "Lamb", "LARS", "LaProp"),
    *("Lion", "MADGRAD", "MARS", "NovoGrad", "Prodigy", "QHAdam", "Ranger", "ScheduleFreeAdamW"),
    *("SGDP", "SGDW", "Shampoo", "SignSGD", "SOAP", "StableAdamW", "Tiger", "Yogi"),
)


@pytest.mark.parametrize("name", LISTED)
def test_pytorch_optimizers(name):
    module = pytest.importorskip(
        "pytorch_optimizer", reason="pytorch-optimizer is not installed", exc_type=ImportError
    )

    def make(model):
        return getattr(module, name)(model.parameters())

    same(esam_run(make, 3, rho=0.0).state_dict(), base_run(make, 3).state_dict(), "rho = 0")
    climbed = esam_run(make, 3, rho=0.1)
    assert not torch.equal(climbed.conv.weight, net().conv.weight)
    assert all(p.isfinite().all() for p in climbed.parameters())


# -- two base optimizers --------------------------------------------------------------------


def beside(model):
    return SideBySide(
        OF_MATRICES(matrices(model), lr=0.02),
        torch.optim.SGD(others(model), lr=0.1, momentum=0.9),
    )


def test_side_by_side_equals_separate_optimizers():
    model, twin = net(), net()
    optimizer = ESAM(beside(model), model, rho=0.0)
    muon = OF_MATRICES(matrices(twin), lr=0.02)
    sgd = torch.optim.SGD(others(twin), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for seed in range(4):
        optimizer.step(losses_of(model), *batch(seed=seed))
    torch.manual_seed(1)
    for seed in range(4):
        muon.zero_grad()
        sgd.zero_grad()
        losses_of(twin)(*batch(seed=seed)).mean().backward()
        muon.step()
        sgd.step()
    same(model.state_dict(), twin.state_dict(), "side by side")


def test_both_share_one_perturbation():
    model = net()
    optimizer = ESAM(beside(model), model, rho=0.1, beta=1.0)
    report = optimizer.step(losses_of(model), *batch())
    assert len(report.perturbed) == len(list(model.parameters()))
    assert float(report.perturbation_norm) == pytest.approx(0.1, rel=1e-4)


def test_side_by_side_under_a_scheduler_and_a_scaler():
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = ESAM(beside(model), model, rho=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for seed in range(2):
        optimizer.zero_grad()
        scaler.scale(optimizer.loss(losses_of(model), *batch(seed=seed))).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.025]
    optimizers = optimizer.base_optimizer.optimizers
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.005, 0.025]


def test_side_by_side_is_saved_and_loaded():
    def start():
        model = net()
        return model, ESAM(beside(model), model, rho=0.1, seed=4)

    def go(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.step(losses_of(model), *batch(seed=seed))

    whole, optimizer = start()
    go(whole, optimizer, range(2))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    go(whole, optimizer, range(2, 4))
    model, resumed = start()
    model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go(model, resumed, range(2, 4))
    same(model.state_dict(), whole.state_dict(), "resumed")
    muon, sgd = saved[1]["optimizers"]
    torch.optim.SGD(others(model), lr=0.1, momentum=0.9).load_state_dict(sgd)
    with pytest.raises(ESAMValueError, match=r"states of 2 optimizers. Received: 1"):
        resumed.load_state_dict({"optimizers": [muon]})


def test_side_by_side_takes_no_group_and_no_closure():
    model = net()
    base = beside(model)
    with pytest.raises(ESAMTypeError, match=r"added to one of the optimizers"):
        ESAM(base, model).add_param_group({"params": []})
    with pytest.raises(ESAMTypeError, match=r"no closure"):
        base.step(lambda: 0.0)


def test_side_by_side_forwards_train_and_eval():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model = net()
    free = schedulefree.SGDScheduleFree(matrices(model), lr=0.1)
    optimizer = ESAM(SideBySide(free, torch.optim.SGD(others(model), lr=0.1)), model)
    optimizer.train()
    assert free.param_groups[0]["train_mode"]
    optimizer.step(losses_of(model), *batch())
    optimizer.eval()
    assert not free.param_groups[0]["train_mode"]


def test_a_deep_copy_of_side_by_side():
    model = net()
    optimizer = ESAM(beside(model), model, rho=0.1)
    lr_scheduler.StepLR(optimizer.base_optimizer, 1)
    twin = copy.deepcopy(optimizer)
    torch.manual_seed(1)
    twin.step(losses_of(twin.model), *batch())
    assert not torch.equal(twin.model.head.weight, model.head.weight)
    torch.manual_seed(1)
    optimizer.step(losses_of(model), *batch())
    same(twin.model.state_dict(), model.state_dict(), "the same step")
    assert repr(optimizer.base_optimizer) == f"SideBySide({OF_MATRICES.__name__}, SGD)"


# -- refusals ----------------------------------------------------------------------------------


def test_lbfgs_is_refused_with_a_reason():
    model = net()
    with pytest.raises(ESAMTypeError, match=r"LBFGS evaluates the loss again within its step"):
        ESAM(torch.optim.LBFGS(model.parameters()), model)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class NeedsHessian(torch.optim.SGD):
    def step(self, closure=None, hessian=None):
        return super().step(closure)


class TwoSteps(torch.optim.SGD):
    def first_step(self):
        """Perturb the weights."""

    def second_step(self):
        """Restore the weights and update."""


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (NeedsClosure, "within its step"),
        (NeedsHessian, "second derivatives"),
        (TwoSteps, "sharpness-aware itself"),
    ],
)
def test_refused_optimizers(base, match):
    model = nn.Linear(2, 2)
    with pytest.raises(ESAMTypeError, match=match):
        ESAM(base(model.parameters(), lr=0.1), model)
    with pytest.raises(ESAMTypeError, match=match):
        SideBySide(base([model.weight], lr=0.1), torch.optim.SGD([model.bias]))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("AdaHessian", "second derivatives"),
        ("SophiaH", "second derivatives"),
        ("AliG", "value of the loss"),
        ("SAM", "sharpness-aware itself"),
        ("WSAM", "sharpness-aware itself"),
        ("LookSAM", "sharpness-aware itself"),
        ("LOMO", "within the backward"),
    ],
)
def test_refused_pytorch_optimizers(name, match):
    module = pytest.importorskip(
        "pytorch_optimizer", reason="pytorch-optimizer is not installed", exc_type=ImportError
    )
    model = nn.Linear(2, 2)
    cls = getattr(module, name)
    if name == "LOMO":
        base = cls(model)
    elif name == "WSAM":
        base = cls(model, model.parameters(), torch.optim.SGD, lr=0.1)
    elif name.endswith("SAM"):
        base = cls(model.parameters(), torch.optim.SGD, lr=0.1)
    else:
        base = cls(model.parameters())
    with pytest.raises(ESAMTypeError, match=match):
        ESAM(base, model)


def test_the_methods_of_other_sams_are_missing_with_a_hint():
    model = nn.Linear(2, 2)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert not hasattr(optimizer, "first_step")
    with pytest.raises(AttributeError, match=r"'first_step': one backward .*optimizer\.loss\("):
        optimizer.first_step(zero_grad=True)
    with pytest.raises(AttributeError, match=r"object has no attribute 'frist_step'\.$"):
        optimizer.frist_step()


def test_a_distributed_state_of_several_optimizers_is_refused():
    model = nn.Linear(4, 3)
    base = SideBySide(torch.optim.SGD([model.weight]), torch.optim.AdamW([model.bias]))
    with pytest.raises(ESAMTypeError, match="Received: a SideBySide"):
        DistributedState(model, ESAM(base, model))


def test_a_scheduler_that_changes_momentum_beside_an_optimizer_without():
    """Torch's error says what to do; it was a KeyError."""
    model = net()
    both = SideBySide(
        torch.optim.SGD(model.conv.parameters(), lr=0.1),
        torch.optim.AdamW(model.hidden.parameters(), lr=0.1),
    )
    with pytest.raises(ValueError, match="cycle_momentum"):
        torch.optim.lr_scheduler.OneCycleLR(both, 0.1, total_steps=4)
    torch.optim.lr_scheduler.OneCycleLR(both, 0.1, total_steps=4, cycle_momentum=False)


def test_side_by_side_does_not_nest():
    model = net()
    both = beside(model)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ESAMTypeError, match="must not contain another one: pass all optimizers"):
        SideBySide(both, other)
