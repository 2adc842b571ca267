"""`DistributedState` in one process: what it refuses, and what it keeps."""

import copy

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, same, sgd
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from esam_core import ESAMValueError
from esam_torch import ESAM, DistributedState, Previous

dcp = pytest.importorskip("torch.distributed.checkpoint")

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
    # Without a process group, torch says that it saves in one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is .*unavailable:UserWarning"),
    # torch 2.6, when it saves.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


def run_of(seed=0, groups=None, **options):
    """Return a model and its ESAM after one step."""
    model = net(seed=seed)
    base = sgd(model) if groups is None else torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
    optimizer = ESAM(base, model, **options)
    optimizer.step(losses_of(model), *batch())
    return model, optimizer


# -- what does not fit changes nothing -------------------------------------------------------------


def test_a_direction_that_the_new_run_does_not_have_is_refused(tmp_path):
    saved = DistributedState(*run_of(ascend=Previous()))
    state = saved.state_dict()
    (key,) = (key for key in state if key.startswith("direction"))
    del state[key]
    model, optimizer = run_of(seed=9)
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMValueError, match="must be created with the same `ascend`"):
        DistributedState(model, optimizer).load_state_dict(state)
    before.check()
    dcp.save({"run": saved}, checkpoint_id=tmp_path)
    with pytest.raises(ESAMValueError, match="must be created with the same `ascend`"):
        dcp.load({"run": DistributedState(model, optimizer)}, checkpoint_id=tmp_path)


def test_a_missing_direction_is_named(tmp_path):
    """torch raises this error before it calls any code of ours; the key says what is missing."""
    dcp.save({"run": DistributedState(*run_of())}, checkpoint_id=tmp_path)
    model, optimizer = run_of(seed=9, ascend=Previous())
    before = Snapshot(model, optimizer)
    with pytest.raises(
        dcp.CheckpointException, match=r"Missing key .* run.direction of ascend=Previous\(\)"
    ):
        dcp.load({"run": DistributedState(model, optimizer)}, checkpoint_id=tmp_path)
    before.check()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _: {}, "must have been returned by DistributedState"),
        (lambda own: {"esam": own.replace('"rho": 0.05', '"rho": -1.0')}, "`rho` must be"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, match):
    state = DistributedState(*run_of()).state_dict()
    state.update(change(state.pop("esam")))
    model, optimizer = run_of(seed=9)
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMValueError, match=match):
        DistributedState(model, optimizer).load_state_dict(state)
    before.check()


def test_a_direction_of_another_model_changes_nothing():
    state = DistributedState(*run_of(ascend=Previous())).state_dict()
    (key,) = (key for key in state if key.startswith("direction"))
    state[key] = {name: g[:1] for name, g in state[key].items()}
    model, optimizer = run_of(seed=9, ascend=Previous())
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMValueError, match="must hold gradients of this model's parameters"):
        DistributedState(model, optimizer).load_state_dict(state)
    before.check()


# -- options of groups -----------------------------------------------------------------------------


def groups_with(conv=None, head=None):
    """Return a function that gives a model's two groups these options."""

    def groups(model):
        last = [p for name, p in model.named_parameters() if not name.startswith("conv")]
        return [{"params": [model.conv.weight], **(conv or {})}, {"params": last, **(head or {})}]

    return groups


def options_of(optimizer):
    return [
        {name: value for name, value in group.items() if name.startswith("esam_")}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize(
    "options", [None, StateDictOptions(flatten_optimizer_state_dict=True)], ids=["nested", "flat"]
)
@pytest.mark.parametrize(
    "given",
    [
        groups_with(),
        groups_with({"esam_rho": 0.9}, {"esam_adaptive": True}),
        groups_with({"esam_rho": 0.9}, {"esam_perturb": True}),
    ],
    ids=["none", "others", "other values"],
)
@pytest.mark.parametrize(
    "saved",
    [groups_with(), groups_with({"esam_rho": 0.3, "esam_adaptive": True}, {"esam_perturb": False})],
    ids=["without", "with"],
)
def test_options_of_groups_come_from_the_checkpoint(tmp_path, saved, given, options):
    model, optimizer = run_of(groups=saved)
    wanted = options_of(optimizer)
    state = DistributedState(model, optimizer, options=options)
    dcp.save({"run": state}, checkpoint_id=tmp_path)
    assert options_of(optimizer) == wanted
    fresh, other = run_of(seed=9, groups=given)
    dcp.load({"run": DistributedState(fresh, other, options=options)}, checkpoint_id=tmp_path)
    assert options_of(other) == wanted and other.count == 1
    torch.manual_seed(0)
    wanted = optimizer.step(losses_of(model), *batch()).perturbation_norm
    torch.manual_seed(0)
    assert other.step(losses_of(fresh), *batch()).perturbation_norm == wanted


def test_options_belong_to_parameters_not_to_places():
    """Like everything that torch loads by name: the groups may have another order."""
    model, optimizer = run_of(groups=groups_with({"esam_rho": 0.3, "lr": 0.2}))
    state = DistributedState(model, optimizer).state_dict()
    fresh, other = run_of(groups=lambda model: groups_with({"lr": 0.4})(model)[::-1])
    DistributedState(fresh, other).load_state_dict(state)
    assert options_of(other) == [{}, {"esam_rho": 0.3}]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]


def test_parameters_with_different_options_must_not_be_joined():
    state = DistributedState(*run_of(groups=groups_with({"esam_rho": 0.3}))).state_dict()
    model, optimizer = run_of(seed=9)
    before = Snapshot(model, optimizer)
    with pytest.raises(ESAMValueError, match=r"must be in different groups.*norm.weight had {}"):
        DistributedState(model, optimizer).load_state_dict(state)
    before.check()


# -- torch's own functions -------------------------------------------------------------------------


def test_torchs_own_functions_drop_the_entry_of_an_unsharded_model_but_say_so():
    state = get_optimizer_state_dict(*run_of(rho=0.3))
    model, optimizer = run_of(
        seed=9, groups=lambda m: [{"params": m.parameters(), "esam_rho": 0.7}]
    )
    optimizer.step(losses_of(model), *batch())
    with pytest.warns(UserWarning, match=r"does not contain ESAM's count.*count=2.*rho=0.05"):
        set_optimizer_state_dict(model, optimizer, state)
    assert optimizer.count == 2 and optimizer.config.rho == 0.05
    assert options_of(optimizer) == [{"esam_rho": 0.7}]


def test_creating_state_as_torch_does_keeps_the_direction():
    """To save, torch runs a step with gradients and learning rates of 0 if there is no state."""
    model = net()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, ascend=Previous())
    optimizer.step(losses_of(model), *batch())
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict()["esam"]["direction"])
    get_optimizer_state_dict(model, optimizer)
    same(optimizer.state_dict()["esam"]["direction"], before, "direction")
