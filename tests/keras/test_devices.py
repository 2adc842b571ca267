"""What devices other than the CPU need, as far as a CPU can show it."""

import keras
import numpy as np
import pytest
from tests.keras.scene import mlp

from esam_core import ESAMConfig, selectors
from esam_keras import ESAM, Everything, Part, Proportional, unit_records
from esam_keras.devices import on_the_host
from esam_keras.noise import Noise
from esam_keras.plan import Planner


def test_inputs_of_a_step_are_not_wider_than_32_bits():
    """MPS has no float64; JAX has none by default."""
    units = unit_records(mlp())
    for config in (
        ESAMConfig(perturb=Everything(), select=Proportional(0.5), ascend=Part(0.5)),
        ESAMConfig.from_arguments(gamma=0.5),
    ):
        planner = Planner(config, units, [True] * len(units))
        inputs = planner.draw(0, 8, compiled=True).inputs
        assert inputs
        assert {value.dtype.itemsize for value in inputs.values()} == {4}


def test_the_offset_of_a_systematic_sample_is_exact():
    units = unit_records(mlp())
    config = ESAMConfig(perturb=Everything(), select=Proportional(0.5))
    drawn = Planner(config, units, [True] * len(units)).draw(3, 8, compiled=True).inputs["offset"]
    offset = selectors.systematic_offset(seed=config.seed, count=3)
    assert abs(float(np.sum(drawn, dtype="float64")) - offset) < 1e-14
    assert np.float32(np.sum(drawn)) == np.float32(offset)


@pytest.mark.backends("torch")
def test_random_numbers_of_mps_are_replayed(monkeypatch):
    import torch

    from esam_keras.backends.torch_state import UnknownState

    state = [torch.tensor(1)]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    unknown = UnknownState(mlp(), Noise())
    for records in (True, False):
        with unknown.one_pass(running=False, records=records):
            assert int(state[0]) == 1
            state[0] = torch.tensor(2 + records)
    unknown.keep_random_state()
    assert int(state[0]) == 3
    unknown.restore_random_state()
    assert int(state[0]) == 1


@pytest.mark.backends("torch")
def test_random_numbers_of_xpu_are_replayed(monkeypatch):
    import torch

    from esam_keras.backends.torch_state import UnknownState

    states = [torch.tensor(1), torch.tensor(2)]
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(
        torch.xpu, "set_rng_state", lambda new, device: states.__setitem__(device.index, new)
    )
    with UnknownState(mlp(), Noise()).copies():
        states[:] = torch.tensor(3), torch.tensor(4)
    assert [int(state) for state in states] == [1, 2]


@pytest.mark.backends("torch")
def test_a_batch_is_moved_once():
    """Not by each pass; the meta device stands for a GPU."""
    import torch

    from esam_keras.backends import current_backend

    batch = ({"x": torch.ones(4, 2)}, torch.ones(4), None)
    with keras.device("meta"):
        (moved, targets, nothing) = current_backend().on_device(batch)
    assert moved["x"].device.type == targets.device.type == "meta"
    assert nothing is None
    (kept, _, _) = current_backend().on_device(batch)
    assert kept["x"] is batch[0]["x"]


@pytest.mark.backends("torch")
def test_the_counter_stays_on_the_host():
    """Written there, it waits for no device; the meta device would lose its value."""
    from tests.keras.scene import cross_entropy, data

    x, y = data(8)
    model = mlp()
    esam = ESAM(keras.optimizers.SGD(0.1))
    model.compile(esam, cross_entropy())
    model.fit(x, y, verbose=0)
    with keras.device("meta"), on_the_host():
        esam.count.assign(5)
    assert int(esam.count.numpy()) == 5


@pytest.mark.backends("jax")
@pytest.mark.parametrize(
    "settings",
    [{}, {"gamma": 1.0, "ascend": Part(0.5)}, {"select": Proportional(0.5)}],
    ids=repr,
)
def test_transfers_are_explicit(settings):
    """As in plain Keras: `jax.transfer_guard` stops only transfers that nobody asked for."""
    import jax
    from tests.keras.scene import cross_entropy, data

    x, y = data(8)
    model = mlp()
    model.compile(ESAM(keras.optimizers.SGD(0.1), **settings), cross_entropy())
    model.fit(x, y, verbose=0)
    function = model.train_function

    def guarded(state, iterator):
        batches = (jax.device_put(batch) for batch in iterator)  # as Keras does on a GPU
        with jax.transfer_guard("disallow"):
            return function(state, batches)

    model.train_function = guarded
    model.fit(x, y, verbose=0)
    assert model.optimizer.report.count == 1
