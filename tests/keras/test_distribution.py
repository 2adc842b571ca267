"""Several devices: `DataParallel` on JAX is one step on the whole batch; others are refused."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from tests.keras.scene import close, cross_entropy, data, mlp, trainable

from esam_core import ESAMRuntimeError
from esam_keras import ESAM, Part, Previous, Proportional, Suffix, TopIncrease, TopLoss

if keras.backend.backend() == "jax":
    from esam_keras.backends import jax as jax_backend

BACKEND = keras.backend.backend()
X, Y = data(16)


@pytest.fixture
def two_devices():
    """`DataParallel` over two devices of the host, which conftest.py sets up."""
    import jax

    if len(jax.devices()) < 2:
        pytest.skip("one device")
    yield keras.distribution.DataParallel(devices=jax.devices()[:2], auto_shard_dataset=False)
    keras.distribution.set_distribution(None)


def fitted(distribution=None, build=mlp, **settings):
    """Run two steps, and return their reports."""
    reports = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: reports.append(esam.report)
    )
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(3)
    model = build()
    esam = ESAM(keras.optimizers.SGD(0.2, momentum=0.9), rho=0.4, seed=7, **settings)
    model.compile(esam, cross_entropy(), metrics=["accuracy"])
    logs = model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[watch]).history
    return model, reports, logs


def with_statistics():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.3, seed=1),
            keras.layers.Dense(3, name="head"),
        ]
    )


@pytest.mark.backends("jax")
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.5, "gamma": 0.5},
        {"build": with_statistics, "perturb": Suffix("norm")},
        {"beta": 1.0, "select": Proportional(0.5), "on_nonfinite": "skip"},
        {"beta": 1.0, "gamma": 1.0, "ascend": Part(0.5)},
        {"beta": 1.0, "gamma": 1.0, "ascend": Previous()},
    ],
    ids=["masks", "statistics", "weights", "part", "previous"],
)
def test_two_devices_run_the_same_step_as_one(settings, two_devices):
    alone, one, logs = fitted(**settings)
    together, both, shown = fitted(two_devices, **settings)
    devices = {len(v.value.sharding.device_set) for v in together.trainable_variables}
    assert devices == {2}
    # One theta, one epsilon, from the gradient and the samples of the whole batch: m-sharpness with
    # m = b, not one perturbation per device.
    for a, b in zip(one, both, strict=True):
        # The models have different names.
        names = [[name.partition("/")[2] for name in r.perturbed] for r in (a, b)]
        assert names[0] == names[1]
        if a.indices is not None:
            np.testing.assert_array_equal(np.array(a.indices), np.array(b.indices))
        close([a.loss], [b.loss], rtol=1e-4)
        if a.losses is not None:
            close([a.losses], [b.losses], rtol=1e-4)
    close(trainable(together), trainable(alone), rtol=1e-4, atol=1e-5)
    for name, values in logs.items():
        np.testing.assert_allclose(shown[name], values, rtol=1e-4)


@pytest.mark.backends("jax")
def test_the_batch_is_split_over_the_devices(two_devices):
    shapes = []

    class Looks(keras.layers.Layer):
        def call(self, x):
            import jax

            jax.debug.inspect_array_sharding(x, callback=shapes.append)
            return x

    def build():
        return keras.Sequential([keras.Input((6,)), Looks(), keras.layers.Dense(3)])

    fitted(two_devices, build=build, select=TopIncrease(1.0))
    assert {sharding.shard_shape((8, 6)) for sharding in shapes} == {(4, 6)}


@pytest.mark.backends("jax")
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 1.0, "gamma": 1.0, "ascend": Part(0.5)},
        {"beta": 1.0, "gamma": 1.0, "ascend": Part(0.3)},  # 3 rows, for 2 devices
        {"beta": 1.0, "select": TopLoss(0.5)},
    ],
    ids=repr,
)
def test_passes_on_some_samples_are_split_too(settings, two_devices, monkeypatch):
    """The work of a device is half of that of one alone."""
    work = []
    compiled_steps = jax_backend.compiled_steps

    def counting(training):
        step, parts = compiled_steps(training)

        def run(*arguments):
            found = step.lower(*arguments).compile().cost_analysis()
            work.append((found[0] if isinstance(found, list) else found)["flops"])
            return step(*arguments)

        return run, parts

    monkeypatch.setattr(jax_backend, "compiled_steps", counting)

    def wide():
        layers = [keras.layers.Dense(64, name=name) for name in ("a", "b", "c")]
        return keras.Sequential([keras.Input((6,)), *layers])

    alone, _, _ = fitted(build=wide, **settings)
    one = work.copy()
    work.clear()
    together, _, _ = fitted(two_devices, build=wide, **settings)
    close(trainable(together), trainable(alone), rtol=1e-4, atol=1e-5)
    assert len(work) == len(one) > 0
    assert max(work) < 0.65 * max(one)


@pytest.mark.backends("jax")
@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.5, "gamma": 0.5}, {"build": with_statistics, "perturb": Suffix("norm")}],
    ids=["masks", "statistics"],
)
def test_weights_that_are_sharded_over_two_devices(settings):
    alone, one, _ = fitted(**settings)
    devices = keras.distribution.list_devices()[:2]
    layout = keras.distribution.LayoutMap(
        keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
    )
    layout[".*first/kernel"] = ("model", None)
    together, both, _ = fitted(
        keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
        ),
        **settings,
    )
    kernel = together.layers[0].kernel.value
    assert {part.data.shape[0] for part in kernel.addressable_shards} == {kernel.shape[0] // 2}
    for a, b in zip(one, both, strict=True):
        close([a.loss], [b.loss], rtol=1e-4)
        if a.losses is not None:
            close([a.losses], [b.losses], rtol=1e-4)
    close(trainable(together), trainable(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.backends("tensorflow")
def test_mirrored_strategy_of_two_devices_is_refused():
    script = """
import keras, tensorflow as tf
from esam_keras import ESAM
device = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    before = model.optimizer
    try:
        model.compile(ESAM("sgd"), "mse")
    except RuntimeError as error:
        print(type(error).__name__, error)
    assert model.optimizer is before
"""
    said = run(script)
    assert said.startswith("ESAMRuntimeError ESAM does not work under a `tf.distribute` strategy")
    assert "each replica" in said  # the reason
    assert "keras.distribution.DataParallel" in said  # the alternative
    assert "MirroredStrategy" in said  # the value received


@pytest.mark.backends("jax")
def test_nnx_mode_is_refused():
    pytest.importorskip("flax")
    said = run(
        """
import keras
from esam_keras import ESAM
assert keras.config.is_nnx_enabled()
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
try:
    model.compile(ESAM("sgd"), "mse")
except RuntimeError as error:
    print(type(error).__name__, error)
""",
        KERAS_NNX_ENABLED="true",
    )
    assert said.startswith("ESAMRuntimeError ESAM does not work in Keras's NNX mode")
    assert "KERAS_NNX_ENABLED=false" in said


@pytest.mark.backends("jax")
def test_nnx_mode_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setattr(keras.config, "is_nnx_enabled", lambda: True, raising=False)
    model = mlp()
    model.compile("sgd", cross_entropy())
    before = model.optimizer
    with pytest.raises(ESAMRuntimeError, match="NNX"):
        model.compile(ESAM("sgd"), cross_entropy())
    assert model.optimizer is before
    assert not any("esam" in name for name in vars(model))


def run(script, **variables):
    """Return the output of a script in a separate process."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout
