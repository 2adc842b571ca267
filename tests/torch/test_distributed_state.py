"""`DistributedState` in one process: what it refuses, and what it keeps."""

import pytest
import torch
from tests.torch.scene import Snapshot, batch, losses_of, net, sgd

from esam_core import ESAMValueError
from esam_torch import ESAM, DistributedState, Previous

dcp = pytest.importorskip("torch.distributed.checkpoint")

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
    # Without a process group, torch says that it saves in one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning"),
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
