"""Several losses that are computed before the first backward, with dropout and BatchNorm.

A pass on one sample, which has no batch statistics, is not tested here: it uses the running
statistics of the moment, with all batches so far.
"""

import copy

import pytest
import torch
from tests.torch.scene import SUFFIX_PART, batch, losses_of, net, same, sgd

from esam_core import Everything
from esam_torch import ESAM, Momentum, Previous, TopIncrease

OPTIONS = {
    "paper": {},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "losses at the peak": {"select": TopIncrease(0.5)},
    "Suffix with Part": SUFFIX_PART,
    "Part and a selection": {**SUFFIX_PART, "gamma": 0.5},
    "Previous": {"ascend": Previous(), "gamma": 0.5},
    "Momentum": {"ascend": Momentum(), "gamma": 1.0},
}


def trained(options):
    """Return a model and its ESAM after two steps, which gives `Previous` a direction."""
    model = net()
    optimizer = ESAM(sgd(model), model, **{"rho": 0.3, **options})
    for seed in (11, 12):
        optimizer.step(losses_of(model), *batch(seed=seed))
    optimizer.zero_grad()
    torch.manual_seed(5)
    return model, optimizer


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_is_the_step_that_it_is_alone(name, order):
    """Its passes have its own dropout masks, and BatchNorm counts each batch once."""
    model, optimizer = trained(OPTIONS[name])
    start = int(model.norm.num_batches_tracked)
    states, alive = [], []
    for seed in (1, 2):
        states.append(torch.get_rng_state())
        alive.append(optimizer.loss(losses_of(model), *batch(seed=seed)))
    found, reports = {}, {}
    for place in order:
        optimizer.zero_grad()
        alive[place].backward()
        found[place], reports[place] = gradients(model), optimizer.report
    statistics = copy.deepcopy(dict(model.named_buffers()))
    for place, seed in enumerate((1, 2)):
        twin, other = trained(OPTIONS[name])
        torch.set_rng_state(states[place])
        other.loss(losses_of(twin), *batch(seed=seed)).backward()
        same(found[place], gradients(twin), "gradients")
        same(reports[place].losses, other.report.losses, "losses")
        same(reports[place].indices, other.report.indices, "indices")
    assert not torch.equal(found[0]["head.weight"], found[1]["head.weight"])
    assert int(statistics["norm.num_batches_tracked"]) == start + 2


@pytest.mark.parametrize("name", ["paper", "SAM"])
def test_state_is_as_after_two_forwards(name):
    model, optimizer = trained(OPTIONS[name])
    twin, _ = trained(OPTIONS[name])
    (sum(optimizer.loss(losses_of(model), *batch(seed=s)) for s in (1, 2))).backward()
    left = torch.get_rng_state()
    torch.manual_seed(5)
    for seed in (1, 2):
        twin(batch(seed=seed)[0])
    same(dict(model.named_buffers()), dict(twin.named_buffers()), "buffers")
    assert torch.equal(left, torch.get_rng_state())
