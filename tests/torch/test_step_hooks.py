"""Hooks of an optimizer's step, and steps that torch runs itself."""

import warnings

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, sgd
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from esam_torch import ESAM, SideBySide


def test_global_hooks_run_once_per_step():
    model = net()
    optimizer = ESAM(sgd(model), model)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", type(o)))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("after", type(o)))),
    ]
    try:
        optimizer.step(losses_of(model), *batch())
        assert seen == [("before", ESAM), ("after", ESAM)]
        optimizer.backward(losses_of(model), *batch())
        optimizer.step()
        assert len(seen) == 4
        sgd(net()).step()  # hooks still run for another optimizer's step
        assert seen[4:] == [("before", torch.optim.SGD), ("after", torch.optim.SGD)]
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_of_one_optimizer_run_on_esam_and_on_its_base():
    model = net()
    base = SideBySide(
        torch.optim.SGD(model.head.parameters(), lr=0.1),
        torch.optim.SGD(model.hidden.parameters(), lr=0.1),
    )
    optimizer = ESAM(base, model)
    seen = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(type(o)))
    base.register_step_pre_hook(lambda o, *_: seen.append(type(o)))
    optimizer.step(losses_of(model), *batch())
    assert seen == [SideBySide, ESAM]


def test_hooks_are_restored_after_an_error_in_the_base_optimizer():
    model = net()
    optimizer = ESAM(sgd(model), model)
    seen = []
    handle = register_optimizer_step_post_hook(lambda o, *_: seen.append(type(o)))
    try:
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(losses_of(model), *batch())
        sgd(net()).step()
        assert seen == [torch.optim.SGD]
    finally:
        handle.remove()


def test_the_step_that_torch_runs_for_a_checkpoint_does_not_warn():
    model = net()
    optimizer = ESAM(torch.optim.Adam(model.parameters()), model)
    before = Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_optimizer_state_dict(model, optimizer)
    before.check(but=("gradients",))
    assert optimizer.count == 0
    with pytest.warns(UserWarning, match="without sharpness-aware gradients"):
        optimizer.step()
