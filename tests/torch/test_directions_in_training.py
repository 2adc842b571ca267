"""`ascend=` in training: custom loops, scalers, errors, checkpoints."""

import contextlib
import copy
import itertools

import pytest
import torch
from tests.torch.climbs import SELECTORS, SOURCES, by_hand, make, plain, rows, train
from tests.torch.scene import Snapshot, batch, net, same, sgd

from esam_core import ESAMTypeError, ESAMValueError, NonFiniteError
from esam_core.directions import climbing_indices
from esam_torch import (
    ESAM,
    All,
    Batch,
    Bernoulli,
    DistributedState,
    Momentum,
    Part,
    Previous,
    Suffix,
    TopIncrease,
    directions,
)

# -- statistics, noise, random numbers ------------------------------------------------------------


def test_an_unused_loss_on_a_part_has_no_side_effects():
    model, optimizer, losses = make(ascend=Part(0.5))
    optimizer.step(losses, *batch())
    before = Snapshot(model, optimizer)
    optimizer.loss(losses, *batch(seed=3))
    before.check(but=("random",))
    assert optimizer.count == 1


@pytest.mark.parametrize("ascend", [Previous(), Momentum()], ids=repr)
def test_a_loss_that_is_not_used_is_a_plain_forward(ascend):
    model, optimizer, losses = make(ascend=ascend)
    optimizer.step(losses, *batch())
    before = Snapshot(model, optimizer)
    loss = optimizer.loss(losses, *batch(seed=3))
    before.check(but=("random", "buffers"))
    assert optimizer.count == 1
    assert model.norm.num_batches_tracked == 2
    assert loss.requires_grad


def test_running_statistics_are_updated_once_per_step():
    for ascend, select in itertools.product(SOURCES, SELECTORS):
        model, optimizer, losses = make(gamma=None, select=select, ascend=ascend)
        train(model, optimizer, losses, steps=4)
        assert model.norm.num_batches_tracked == 4, (ascend, select)


# -- the loss in custom loops ---------------------------------------------------------------


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_the_loss_can_be_used_like_any_other(ascend):
    """`loss.backward()` at any scale, with penalties, and `torch.autograd.grad`."""
    model, optimizer, losses = make(ascend=ascend, dropout=0.0)
    train(model, optimizer, losses, steps=1)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def again():
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        optimizer.zero_grad()

    again()
    optimizer.backward(losses, *batch())
    plain = [p.grad.clone() for p in model.parameters()]
    again()
    (3.0 * optimizer.loss(losses, *batch()) + model.head.weight.square().sum()).backward()
    for (name, p), g in zip(model.named_parameters(), plain, strict=True):
        penalty = 2 * p.detach() if name == "head.weight" else 0.0
        torch.testing.assert_close(p.grad, 3.0 * g + penalty, rtol=1e-5, atol=1e-6)
    again()
    found = torch.autograd.grad(optimizer.loss(losses, *batch()), list(model.parameters()))
    for g, w in zip(found, plain, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-7)


def test_a_negative_scale_reverses_a_part_but_not_earlier_directions():
    """The perturbation increases what is minimised; the previous `.grad` already has the sign."""
    model, losses = plain()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, rho=0.2, beta=1.0, gamma=1.0, ascend=Previous())
    (-optimizer.loss(losses, *rows(0))).backward()
    given = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    wanted = by_hand(model, losses, given, rows(1), 0.2)
    (-optimizer.loss(losses, *rows(1))).backward()
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, -w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_a_gradient_scaler_changes_nothing(ascend):
    model, optimizer, losses = make(ascend=ascend, dropout=0.0)
    scaled, other, same_losses = make(ascend=ascend, dropout=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        optimizer.step(losses, *batch(seed=i))
        other.zero_grad()
        scaler.scale(other.loss(same_losses, *batch(seed=i))).backward()
        scaler.step(other)
        scaler.update()
    for p, q in zip(model.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_an_update_skipped_by_the_scaler_is_ignored():
    model, optimizer, losses = make(ascend=Previous(), dropout=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(2):
        optimizer.zero_grad()
        scaler.scale(optimizer.loss(losses, *batch(seed=i))).backward()
        if i == 1:
            model.head.weight.grad[0, 0] = torch.inf
        else:
            scaler.unscale_(optimizer)
            given = {n: p.grad.clone() for n, p in model.named_parameters()}
        scaler.step(optimizer)
        scaler.update()
    same(optimizer.state_dict()["esam"]["direction"], given, "direction")


def test_under_autocast():
    for ascend in SOURCES:
        model, optimizer, losses = make(ascend=ascend, dropout=0.0)
        for i in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = optimizer.loss(losses, *batch(seed=i))
            loss.backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert optimizer.report.perturbation_norm == pytest.approx(0.1, rel=1e-3)


# -- non-finite values, errors -------------------------------------------------------------------


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_nonfinite_values(ascend):
    x, y = batch()
    bad = x.clone()
    bad[0] = torch.nan
    for mode in ("propagate", "skip", "raise"):
        model, optimizer, losses = make(ascend=ascend, on_nonfinite=mode)
        optimizer.step(losses, x, y)
        before = Snapshot(model, optimizer)
        optimizer.zero_grad()
        if mode == "raise":
            with pytest.raises(NonFiniteError):
                optimizer.loss(losses, bad, y).backward()
            before.check(but=("gradients",))
            continue
        optimizer.loss(losses, bad, y).backward()
        assert optimizer.report.skipped == (mode == "skip")
        if mode == "propagate":
            assert all(p.grad.isnan().any() for p in model.parameters())
            before.check(but=("gradients", "buffers", "random", "optimizer"))
        else:
            before.check(but=("gradients", "random", "optimizer"))


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
@pytest.mark.parametrize("select", [All(), TopIncrease(0.5)], ids=repr)
@pytest.mark.parametrize("error", [ValueError("here"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_any_pass_changes_nothing(ascend, select, error):
    model, optimizer, losses = make(ascend=ascend, gamma=None, select=select)
    optimizer.step(losses, *batch())
    calls, at = [], 0

    def failing(x, y):
        calls.append(len(y))
        if len(calls) == at:
            raise error
        return losses(x, y)

    before = Snapshot(model, optimizer)
    while not calls or len(calls) >= at:
        at += 1
        calls.clear()
        with contextlib.suppress(type(error)):
            optimizer.backward(failing, *batch(seed=2))
            break
        before.check()
    assert at > 1


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
@pytest.mark.parametrize("perturb", [Bernoulli(0.5), Suffix("hidden")], ids=repr)
def test_a_run_resumes_bit_for_bit(tmp_path, ascend, perturb):
    def go_on(model, optimizer, losses, first, last):
        for i in range(first, last):
            torch.manual_seed(100 + i)
            optimizer.step(losses, *batch(seed=i))
        return model

    options = {"ascend": ascend, "perturb": perturb, "gamma": 0.5}
    whole = go_on(*make(**options), 0, 6)
    model, optimizer, losses = make(**options)
    go_on(model, optimizer, losses, 0, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    go_on(model, optimizer, losses, 3, 4)  # the saved state must not change later
    fresh, other, same_losses = make(seed=9, **options)
    weights, state = torch.load(tmp_path / "run.pt", weights_only=True)
    fresh.load_state_dict(weights)
    other.load_state_dict(state)
    go_on(fresh, other, same_losses, 3, 6)
    same(fresh.state_dict(), whole.state_dict(), "weights")


def test_a_direction_of_another_model_is_refused():
    _, optimizer, losses = make(ascend=Previous())
    optimizer.step(losses, *batch())
    state = optimizer.state_dict()
    other, others_losses = plain()
    theirs = ESAM(torch.optim.SGD(other.parameters(), lr=0.1), other, ascend=Previous())
    theirs.step(others_losses, *rows(0))
    kept = {n: g.clone() for n, g in theirs.state_dict()["esam"]["direction"].items()}
    wrong = {**theirs.state_dict(), "esam": state["esam"]}
    with pytest.raises(ESAMValueError, match="must hold gradients of this model's parameters"):
        theirs.load_state_dict(wrong)
    same(theirs.state_dict()["esam"]["direction"], kept, "direction")
    assert theirs.count == 1


def test_a_distributed_state_contains_the_direction():
    model, optimizer, losses = make(ascend=Previous(), perturb=Suffix("hidden"))
    optimizer.step(losses, *batch())
    state = DistributedState(model, optimizer).state_dict()
    assert set(state["direction of ascend=Previous()"]) == {
        name for name, _ in model.named_parameters()
    }
    other, fresh, _ = make(seed=9, ascend=Previous(), perturb=Suffix("hidden"))
    DistributedState(other, fresh).load_state_dict(state)
    kept = optimizer.state_dict()["esam"]["direction"]
    same(fresh.state_dict()["esam"]["direction"], kept, "direction")
    wrong, without, _ = make(seed=9)
    del state["direction of ascend=Previous()"]
    with pytest.raises(ESAMValueError, match="must be created with the same `ascend`"):
        DistributedState(wrong, without).load_state_dict(state)


def test_checkpoints_without_a_direction_load():
    _, optimizer, losses = make(ascend=Batch())
    optimizer.step(losses, *batch())
    state = optimizer.state_dict()
    _, fresh, same_losses = make(ascend=Previous())
    with pytest.warns(UserWarning, match=r"ascend=Batch\(\) \(in code Previous"):
        fresh.load_state_dict(state)
    assert fresh.config.ascend == Batch()
    fresh.step(same_losses, *batch())


def test_a_direction_follows_its_model():
    """To another device, whose gradients are not copied to the place of the old ones."""
    here, there = torch.ones(2), torch.ones(2, device="meta")
    assert directions._copy({"w": there}, {"w": here})["w"].device.type == "meta"
    assert directions._shards([here], [there])[0].device.type == "meta"
    again = torch.zeros(2)
    assert directions._copy({"w": here}, {"w": again})["w"] is again


def test_previous_keeps_one_copy_of_perturbable_gradients():
    model, optimizer, losses = make(ascend=Previous(), perturb=Suffix("hidden"))
    train(model, optimizer, losses)
    kept = optimizer.state_dict()["esam"]["direction"]
    assert set(kept) == {"hidden.weight", "hidden.bias", "head.weight", "head.bias"}
    place = {name: g.data_ptr() for name, g in kept.items()}
    train(model, optimizer, losses)
    kept = optimizer.state_dict()["esam"]["direction"]
    assert {name: g.data_ptr() for name, g in kept.items()} == place
    model, optimizer, losses = make(ascend=Momentum())
    train(model, optimizer, losses)
    assert optimizer._run.memory.gradients == {}


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.25, "previous", Previous, Part], ids=repr)
def test_invalid_directions_are_refused(wrong):
    model = net()
    with pytest.raises(ESAMTypeError, match=r"`ascend` must be Batch\(\), Part\(share\)"):
        ESAM(sgd(model), model, ascend=wrong)


def test_a_part_of_a_batch_that_cannot_be_split_is_refused():
    model, optimizer, losses = make(ascend=Part(0.5))
    stored = batch()
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMValueError, match="the batch must contain the samples"):
        optimizer.loss(lambda: losses(*stored))
    before.check(but=("random",))


def test_the_drawn_samples_are_used():
    _, optimizer, losses = make(ascend=Part(0.25))
    for i in range(3):
        report = optimizer.step(losses, *batch(seed=i))
        drawn = climbing_indices(Part(0.25), 8, seed=0, count=i)
        assert report.part.tolist() == drawn.tolist()
        assert report.losses.shape == (2,)
