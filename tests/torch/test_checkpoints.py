"""Saving and loading: a resumed run equals an uninterrupted one, bit for bit."""

import copy
import json

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, same, sgd

from esam_core import ESAMValueError
from esam_torch import (
    ESAM,
    Bernoulli,
    Between,
    Every,
    Everything,
    Only,
    Previous,
    Proportional,
    Random,
    RandomSuffix,
    SideBySide,
    Sometimes,
    Suffix,
    TopIncrease,
    TopLoss,
)

BASES = {
    "SGD": sgd,
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True),
}


def go(model, optimizer, seeds):
    """Train, and return the perturbed parameters and selected samples of each step."""
    seen = []
    for seed in seeds:
        report = optimizer.step(losses_of(model), *batch(seed=seed))
        indices = None if report.indices is None else report.indices.tolist()
        seen.append((report.perturbed, indices))
    return seen


def resume(path, make, seeds):
    """Create new objects, load a file into them and continue."""
    saved = torch.load(path, weights_only=True)
    model = net(seed=99)
    optimizer = make(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    return model, optimizer, go(model, optimizer, seeds)


def save(path, model, optimizer):
    """Write a checkpoint like a user's script."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "random": torch.get_rng_state()}, path)


OPTIONS = {
    "paper": {"rho": 0.1, "beta": 0.6, "gamma": 0.5},
    "weights": {"perturb": Bernoulli(0.5, unit="weight"), "select": TopLoss(0.5)},
    "random": {"perturb": Sometimes(0.5, Bernoulli(0.5)), "select": Random(0.3)},
    "suffixes": {"perturb": RandomSuffix(("conv", "head"), (0.3, 0.7)), "gamma": 1.0},
    "schedule": {"perturb": Every(2, Between(1, 5)), "select": Proportional(0.5, score="increase")},
    "adaptive": {"adaptive": True, "rho": 1.0, "norm": "estimated", "seed": 12},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", OPTIONS)
def test_resuming_bit_for_bit(options, base, tmp_path):
    def make(model):
        return ESAM(BASES[base](model), model, **OPTIONS[options])

    model = net()
    optimizer = make(model)
    torch.manual_seed(1)
    go(model, optimizer, range(3))
    save(tmp_path / "state.pt", model, optimizer)
    wanted = go(model, optimizer, range(3, 7))
    resumed, other, found = resume(tmp_path / "state.pt", make, range(3, 7))
    assert found == wanted
    assert other.count == optimizer.count == 7
    same(resumed.state_dict(), model.state_dict(), "model")
    same(other.state_dict(), optimizer.state_dict(), "optimizer")


def test_hyperparameters_come_from_the_checkpoint(tmp_path):
    """Like the learning rate; if the loading code has others, a warning lists them, once."""
    model = net()
    optimizer = ESAM(sgd(model), model, rho=0.3, perturb=Suffix("hidden"), select=TopLoss(0.25))
    torch.manual_seed(1)
    go(model, optimizer, range(2))
    save(tmp_path / "state.pt", model, optimizer)
    wanted = go(model, optimizer, range(2, 4))
    with pytest.warns(UserWarning, match="other settings") as warned:
        _, other, found = resume(
            tmp_path / "state.pt", lambda m: ESAM(sgd(m, lr=0.7), m, seed=9), range(2, 4)
        )
    assert found == wanted
    assert other.config == optimizer.config
    other.load_state_dict(ESAM(other.base_optimizer, other.model, rho=0.4).state_dict())  # once
    assert other.config.rho == 0.4
    assert other.param_groups[0]["lr"] == 0.1
    assert len(warned) == 1 and warned[0].filename == __file__
    assert (
        "rho=0.3 (in code 0.05); perturb=Suffix(start='hidden') (in code Bernoulli(beta=0.6, "
        "unit='tensor')); select=TopLoss(gamma=0.25) (in code TopIncrease(gamma=0.5)); seed=0 (in "
        "code 9). "
    ) in str(warned[0].message)


def test_settings_in_code_are_kept_as_the_warning_says(recwarn):
    model = net()
    saved = ESAM(sgd(model), model, rho=0.3).state_dict()
    other = ESAM(sgd(model), model, rho=0.4)
    other.base_optimizer.load_state_dict(saved)
    assert other.config.rho == 0.4 and not recwarn


def test_options_of_groups_are_saved(tmp_path):
    def make(model):
        groups = [
            {"params": list(model.conv.parameters()), "esam_rho": 0.5},
            {"params": list(model.head.parameters()), "esam_perturb": False},
        ]
        return ESAM(torch.optim.SGD(groups, lr=0.1), model, perturb=Everything())

    model = net()
    optimizer = make(model)
    optimizer.param_groups[0]["esam_rho"] = 0.25  # as set by a schedule
    save(tmp_path / "state.pt", model, optimizer)
    _, other, _ = resume(tmp_path / "state.pt", make, ())
    assert [g.get("esam_rho") for g in other.param_groups] == [0.25, None]
    assert [g.get("esam_perturb") for g in other.param_groups] == [None, False]


def test_a_sampler_with_a_function_is_taken_from_the_code(tmp_path):
    perturb = Only(lambda unit: unit.name.startswith("head"))
    model = net()
    optimizer = ESAM(sgd(model), model, rho=0.3, perturb=perturb, seed=5)
    go(model, optimizer, range(2))
    save(tmp_path / "state.pt", model, optimizer)
    _, other, (seen,) = resume(
        tmp_path / "state.pt",
        lambda m: ESAM(sgd(m), m, rho=0.3, perturb=perturb, seed=5),
        range(1),
    )
    assert seen[0] == ("head.weight", "head.bias")
    assert other.config == optimizer.config
    assert other.count == 3


@pytest.mark.parametrize("base", BASES)
def test_the_state_loads_into_the_bare_base_and_back(base):
    model, twin = net(), net()
    optimizer = ESAM(BASES[base](model), model, rho=0.1)
    go(model, optimizer, range(3))
    bare = BASES[base](twin)
    twin.load_state_dict(model.state_dict())
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    same(bare.state_dict(), optimizer.base_optimizer.state_dict(), "the base's state")
    for m, o in ((model, optimizer.base_optimizer), (twin, bare)):
        torch.manual_seed(3)
        o.zero_grad()
        losses_of(m)(*batch()).mean().backward()
        o.step()
    same(twin.state_dict(), model.state_dict(), "one more base step")

    back = ESAM(BASES[base](twin), twin, rho=0.2, seed=3)
    back.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert back.config.rho == 0.2 and back.config.seed == 3 and back.count == 0
    same(back.base_optimizer.state_dict(), bare.state_dict(), "back again")


def test_a_saved_state_does_not_change_later():
    model = net()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    saved = optimizer.state_dict()
    go(model, optimizer, range(2))
    assert saved["esam"]["count"] == 0


def test_a_state_that_cannot_be_loaded_changes_nothing():
    model = net()
    optimizer = ESAM(sgd(model), model)
    optimizer.backward(losses_of(model), *batch())
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    own = good["esam"]
    changes = {
        "`rho` must be finite": {"rho": -1.0},
        "`name` must be one of": {"perturb": {"name": "Nothing"}},
        "`on_nonfinite` must be": {"on_nonfinite": "ignore"},
    }
    bad_entries = {
        match: {**own, "count": 3, "config": {**own["config"], **change}}
        for match, change in changes.items()
    }
    for missing in own:
        bad_entries[rf"written\. (?!.*'{missing}')"] = {k: own[k] for k in own if k != missing}
    bad_entries[r"written\. Received: \[3\]"] = [3]
    before = Snapshot(model, optimizer)
    for match, entry in bad_entries.items():
        state = copy.deepcopy(good)
        state["esam"] = entry
        state["param_groups"][0]["lr"] = 0.5
        with pytest.raises(ESAMValueError, match=match):
            optimizer.load_state_dict(state)
        before.check()
    state = copy.deepcopy(good)
    state["esam"]["count"] = 7
    state["param_groups"] = state["param_groups"] * 2
    with pytest.raises(ValueError, match=r"parameter group"):
        optimizer.load_state_dict(state)
    before.check()
    assert optimizer.count == 1


def test_a_bare_state_keeps_the_options_of_the_groups():
    model = net()
    groups = [
        {"params": list(model.conv.parameters()), "esam_perturb": False},
        {"params": list(model.head.parameters()), "esam_rho": 0.3, "esam_adaptive": True},
    ]
    optimizer = ESAM(torch.optim.SGD(groups, lr=0.1), model, beta=1.0)
    bare = [{"params": g["params"]} for g in groups]
    optimizer.load_state_dict(torch.optim.SGD(bare, lr=0.7).state_dict())
    first, second = optimizer.param_groups
    assert first["lr"] == second["lr"] == 0.7 and first["esam_perturb"] is False
    assert second["esam_rho"] == 0.3 and second["esam_adaptive"] is True
    assert optimizer.step(losses_of(model), *batch()).perturbed == ("head.weight", "head.bias")


def test_a_direction_is_loaded_only_with_the_rest():
    model = net()
    optimizer = ESAM(sgd(model), model, ascend=Previous())
    optimizer.step(losses_of(model), *batch())
    state = copy.deepcopy(optimizer.state_dict())
    state["esam"]["direction"] = {n: g + 1 for n, g in state["esam"]["direction"].items()}
    state["param_groups"] = []
    before = copy.deepcopy(optimizer._run.memory.gradients)
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(state)
    for name, gradient in optimizer._run.memory.gradients.items():
        assert torch.equal(gradient, before[name])


def test_side_by_side_loads_all_states_or_none():
    model = net()
    one = torch.optim.SGD(model.conv.parameters(), lr=0.1)
    base = SideBySide(one, torch.optim.SGD(model.head.parameters(), lr=0.1))
    state = copy.deepcopy(base.state_dict())
    state["optimizers"][0]["param_groups"][0]["lr"] = 7.0
    state["optimizers"][1]["param_groups"][0]["params"] = [0]
    with pytest.raises(ESAMValueError, match=r"for optimizer 1, groups of \[1\] .* of \[2\]"):
        base.load_state_dict(state)
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.1]


def test_loading_forgets_pending_gradients():
    model = net()
    optimizer = ESAM(sgd(model), model)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.backward(losses_of(model), *batch())
    optimizer.load_state_dict(state)
    optimizer.step(losses_of(model), *batch())


def test_everything_saved_is_plain_data():
    """A loader without our classes can read it: numbers, strings, lists and dictionaries."""
    model = net()
    for options in OPTIONS.values():
        state = ESAM(sgd(model), model, **options).state_dict()["esam"]
        _plain(state)
    assert ESAM(sgd(model), model, select=TopIncrease(0.5)).state_dict()["esam"]["count"] == 0


def _plain(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            assert type(key) is str
            _plain(inner)
    elif isinstance(value, list):
        for inner in value:
            _plain(inner)
    else:
        assert value is None or type(value) in (bool, int, float, str)


def hooked(optimizer):
    """Register one hook of every kind; return the list of their calls."""
    noted = []

    def after_saving(_, state):
        noted.append(("saved", sorted(state)))
        return {**state, "mine": 7}

    def before_loading(_, state):
        noted.append(("loading", state.pop("mine")))
        return dict(state)

    optimizer.register_state_dict_pre_hook(lambda o: noted.append(("saving", o is optimizer)))
    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(
        lambda o: noted.append(("loaded", o is optimizer, o.param_groups[0]["lr"]))
    )
    return noted


def test_hooks_of_state_dicts_run_as_on_any_optimizer():
    model = net()
    base, optimizer = sgd(model), ESAM(sgd(model), model, seed=5)
    theirs, ours = hooked(base), hooked(optimizer)
    states = base.state_dict(), optimizer.state_dict()
    assert all(state["mine"] == 7 for state in states)
    base.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    assert states[1]["mine"] == 7  # hooks get a copy
    kinds = ["saving", "saved", "loading", "loaded"]
    assert [kind for kind, *_ in ours] == [kind for kind, *_ in theirs] == kinds
    assert ours[1] == ("saved", ["esam", "param_groups", "state"])
    assert ours[2:] == theirs[2:]


def test_a_hook_may_change_what_is_loaded():
    model = net()
    optimizer = ESAM(sgd(model), model)
    state = optimizer.state_dict()

    def later(_, state):
        return {**state, "esam": {**state["esam"], "count": 12}}

    optimizer.register_load_state_dict_pre_hook(later)
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.count))
    optimizer.load_state_dict(state)
    assert optimizer.count == 12 and seen == [12] and state["esam"]["count"] == 0


def test_an_entry_in_the_groups_alone_is_loaded():
    """Trainers may gather a sharded state, and number its parameters again."""
    model = net()
    optimizer = ESAM(sgd(model), model, seed=3)
    optimizer.step(losses_of(model), *batch())
    state = optimizer.state_dict()
    own = state.pop("esam")
    note = json.dumps({**own, "options": {"esam_rho": 0.5}})
    state["param_groups"][0]["esam: count, seed, hyperparameters"] = note
    other = ESAM(sgd(model), model, seed=3)
    other.load_state_dict(state)
    assert other.count == 1 and other.param_groups[0]["esam_rho"] == 0.5
