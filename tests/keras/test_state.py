"""Moving statistics and random numbers: updated once per step, with the same noise in every pass.

The conformance kit checks seeded layers; these tests cover the rest.
"""

import contextlib
import random

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import cross_entropy, data, same, weights

from esam_core import ESAMTypeError, ESAMValueError
from esam_keras import ESAM, Batch, Everything, Previous, Random

X, Y = data()


def with_dropout(seed=None):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dropout(0.5, seed=seed),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("seed", [None, 7])
def test_the_selection_pass_uses_the_noise_of_the_ascent_pass(seed, run_eagerly):
    # With a negligible radius, only different noise could change a loss.
    model = with_dropout(seed)
    model.compile(ESAM("sgd", rho=1e-7, beta=1.0), cross_entropy(), run_eagerly=run_eagerly)
    seen = []
    for _ in range(2):
        model.train_on_batch(X, Y)
        report = model.optimizer.report
        np.testing.assert_allclose(ops.convert_to_numpy(report.increases), 0.0, atol=1e-5)
        seen.append(ops.convert_to_numpy(report.losses))
    assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_the_random_state_advances_like_one_forward():
    models = []
    for rho in (0.0, 0.3):
        keras.utils.set_random_seed(1)
        model = with_dropout()
        model.compile(ESAM(keras.optimizers.SGD(0.0), rho=rho), cross_entropy())
        losses = [float(model.train_on_batch(X, Y)) for _ in range(3)]
        models.append(losses)
    np.testing.assert_allclose(models[0], models[1], rtol=1e-6)


def test_global_generators_of_python_and_numpy_are_not_used():
    model = with_dropout()
    model.compile(ESAM("sgd"), cross_entropy())
    model.train_on_batch(X, Y)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    model.train_on_batch(X, Y)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_moving_statistics_are_those_of_a_base_step():
    def build():
        keras.utils.set_random_seed(3)
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(3),
            ]
        )

    statistics = []
    for optimizer in (keras.optimizers.SGD(0.1), ESAM(keras.optimizers.SGD(0.1), rho=0.5)):
        model = build()
        model.compile(optimizer, cross_entropy())
        model.train_on_batch(X, Y)
        statistics.append([np.array(v.value) for v in model.layers[1].non_trainable_variables])
    for a, b in zip(*statistics, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def with_batchnorm():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            keras.layers.Conv2D(3, 3),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )


IMAGES = np.random.default_rng(0).normal(3.0, 2.0, (6, 5, 5, 2)).astype("float32")


@pytest.mark.parametrize("ascend", [Batch(), Previous()])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_batch_of_one_sample_is_normalised_by_itself(ascend, gamma):
    """With a negligible perturbation, training is that of the base optimizer."""
    found = []
    esam = ESAM(keras.optimizers.SGD(0.1), rho=1e-7, beta=1.0, gamma=gamma, ascend=ascend)
    for optimizer in (keras.optimizers.SGD(0.1), esam):
        model = with_batchnorm()
        model.compile(optimizer, cross_entropy())
        for i in range(4):
            model.train_on_batch(IMAGES[i : i + 1], Y[i : i + 1])
        found.append(weights(model))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_moving_statistics_that_no_pass_would_update_are_refused():
    model = with_batchnorm()
    esam = ESAM("sgd", perturb=Everything(), select=Random(0.5), ascend=Previous())
    model.compile(esam, cross_entropy())
    model.train_on_batch(IMAGES[:2], Y[:2])  # a base step
    before = weights(model)
    with pytest.raises(ESAMValueError, match="which selects 1 of 2 samples"):
        model.train_on_batch(IMAGES[2:4], Y[2:4])
    same(weights(model), before)
    model.train_on_batch(IMAGES, Y[:6])
    assert len(esam.report.indices) == 3


def test_frozen_batchnorm_needs_no_update():
    model = with_batchnorm()
    model.layers[1].trainable = False
    esam = ESAM("sgd", perturb=Everything(), select=Random(0.5), ascend=Previous())
    model.compile(esam, cross_entropy())
    for _ in range(2):
        model.train_on_batch(IMAGES[:2], Y[:2])
    assert len(esam.report.indices) == 1


@pytest.mark.backends("tensorflow", "torch")
def test_unseeded_noise_of_a_custom_layer_is_replayed():
    class Noise(keras.layers.Layer):
        def call(self, x):
            return x + keras.random.normal(ops.shape(x))

    keras.random.normal((1,))  # Keras creates its global generator at first use
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8), Noise(), keras.layers.Dense(3)]
    )
    model.compile(ESAM("sgd", rho=1e-7, beta=1.0), cross_entropy())
    seen = []
    for _ in range(2):
        model.train_on_batch(X, Y)
        report = model.optimizer.report
        np.testing.assert_allclose(ops.convert_to_numpy(report.increases), 0.0, atol=1e-5)
        seen.append(ops.convert_to_numpy(report.losses))
    assert np.abs(seen[0] - seen[1]).max() > 1e-3


@pytest.mark.backends("torch")
class TestTorchModules:
    """torch modules in a Keras model."""

    def model(self):
        import torch

        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2)
        )
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.TorchModuleWrapper(module), keras.layers.Dense(3)]
        )
        model(X, training=False)  # builds it
        return model

    def test_are_perturbed(self):
        model = self.model()
        optimizer = ESAM(keras.optimizers.SGD(0.1), rho=0.3, beta=1.0, gamma=1.0)
        model.compile(optimizer, cross_entropy())
        model.train_on_batch(X, Y)
        assert len(optimizer.report.perturbed) == 6
        np.testing.assert_allclose(float(optimizer.report.perturbation_norm), 0.3, rtol=1e-5)

    def test_use_the_gradient_at_the_perturbed_weights(self):
        # Compare with torch's functional call, without noise.
        import torch

        model = self.model()
        module = model.layers[0].module
        module[2].p = 0.0
        theta = [v.value.detach().clone() for v in model.trainable_variables]
        names = [n for n, _ in module.named_parameters()]
        x, y = torch.from_numpy(X), torch.from_numpy(Y)

        def gradient(values):
            leaves = [v.clone().requires_grad_() for v in values]
            own = dict(zip(names, leaves[:4], strict=True))
            buffers = {n: b.clone() for n, b in module.named_buffers()}
            hidden = torch.func.functional_call(module, {**own, **buffers}, (x,))
            logits = hidden @ leaves[4] + leaves[5]
            return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), leaves)

        module.train()
        g = gradient(theta)
        length = torch.sqrt(sum((a * a).sum() for a in g))
        descent = gradient([t + 0.3 * a / length for t, a in zip(theta, g, strict=True)])
        model.compile(
            ESAM(keras.optimizers.SGD(0.1), rho=0.3, beta=1.0, gamma=1.0), cross_entropy()
        )
        model.train_on_batch(X, Y)
        for v, t, d in zip(model.trainable_variables, theta, descent, strict=True):
            torch.testing.assert_close(v.value.detach(), t - 0.1 * d, rtol=1e-4, atol=1e-6)

    def test_buffers_are_updated_once(self):
        model = self.model()
        norm = model.layers[0].module[1]
        x = model.layers[0].module[0](keras.ops.convert_to_tensor(X)).detach()
        model.compile(ESAM("sgd", rho=0.3), cross_entropy())
        model.train_on_batch(X, Y)
        np.testing.assert_allclose(norm.running_mean, 0.1 * x.mean(0), rtol=1e-4, atol=1e-6)
        assert int(norm.num_batches_tracked) == 1

    def test_noise_is_replayed(self):
        model = self.model()
        model.compile(ESAM("sgd", rho=1e-7, beta=1.0), cross_entropy())
        model.train_on_batch(X, Y)
        np.testing.assert_allclose(model.optimizer.report.increases, 0.0, atol=1e-4)

    def test_running_statistics_that_no_pass_would_update_are_refused(self):
        model = self.model()
        esam = ESAM("sgd", perturb=Everything(), select=Random(0.05), ascend=Previous())
        model.compile(esam, cross_entropy())
        model.train_on_batch(X, Y)  # a base step
        with pytest.raises(ESAMValueError, match="BatchNorm needs at least 2 selected"):
            model.train_on_batch(X, Y)

    @pytest.mark.parametrize("how", ["skip", "raise", "a loss"])
    def test_a_step_that_fails_changes_no_buffer(self, how):
        import torch

        def loss(y, y_pred):
            if how == "a loss" and fail:
                raise FloatingPointError("in the loss")
            return cross_entropy(reduction=None)(y, y_pred)

        fail = False
        model = self.model()
        model.compile(ESAM("sgd", on_nonfinite="propagate" if how == "a loss" else how), loss)
        model.train_on_batch(X, Y)
        buffers = dict(model.layers[0].module.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        random_state = torch.get_rng_state()
        fail = True
        x = X.copy()
        x[3] = np.nan
        with (
            contextlib.nullcontext() if how == "skip" else pytest.raises(FloatingPointError),
            np.errstate(all="ignore"),
        ):
            model.train_on_batch(X if how == "a loss" else x, Y)
        assert how == "a loss" or model.optimizer.report.skipped
        after = dict(model.layers[0].module.named_buffers())
        assert all(after[name] is buffer for name, buffer in buffers.items())
        assert all(torch.equal(after[name], old) for name, old in before.items())
        assert how != "a loss" or torch.equal(torch.get_rng_state(), random_state)
        fail = False
        model.train_on_batch(X, Y)
        assert int(after["1.num_batches_tracked"]) == 2

    def test_one_selected_sample_uses_running_statistics(self):
        model = self.model()
        model.compile(ESAM("sgd", rho=0.3, gamma=0.05), cross_entropy())
        model.train_on_batch(X, Y)
        assert len(model.optimizer.report.indices) == 1
        assert all(np.isfinite(w).all() for w in weights(model))


@pytest.mark.backends("torch")
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_buffers_of_a_keras_layer_change_once_per_step(gamma):
    import torch

    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.register_buffer("written", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))
            self.register_buffer("grown", torch.zeros(0))

        def call(self, x):
            self.written += 1
            self.replaced = self.replaced + 1
            self.grown = torch.cat([self.grown, self.grown.new_ones(1)])
            return x * (1 + self.written)  # each pass reads the same value

    def values(layer):
        return [float(layer.written), float(layer.replaced), len(layer.grown)]

    found = []
    for optimizer in ("sgd", ESAM("sgd", rho=1e-7, beta=1.0, gamma=gamma)):
        layer = Counts()
        model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(3)])
        model.compile(optimizer, cross_entropy())
        first = values(layer)
        for _ in range(3):
            model.train_on_batch(X, Y)
        found.append([new - old for new, old in zip(values(layer), first, strict=True)])
    assert found[0] == found[1]
    if gamma < 1.0:
        np.testing.assert_allclose(model.optimizer.report.increases, 0.0, atol=1e-5)


@pytest.mark.backends("torch")
def test_buffers_in_checkpointed_layers_change_once_per_step():
    import torch

    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def call(self, x):
            self.n += 1
            return x * 2.0

    with keras.RematScope(mode="full"):
        layer = Counts()
        first, last = keras.layers.Dense(8), keras.layers.Dense(3)
        model = keras.Sequential([keras.Input((6,)), first, layer, last])
    model.compile(ESAM("sgd"), cross_entropy())
    model.train_on_batch(X, Y)
    before = float(layer.n)
    model.train_on_batch(X, Y)
    assert float(layer.n) == before + 1


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("inside", [False, True])
def test_raw_variables_of_tensorflow_are_refused(inside):
    import tensorflow as tf

    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="counts")
            self.n = [tf.Variable(0.0)] if inside else tf.Variable(0.0)

        def call(self, x):
            return x

    model = keras.Sequential([keras.Input((6,)), Counts(), keras.layers.Dense(3)])
    message = (
        r"`self.add_weight\(..., trainable=False\)`. Received: attribute 'n' of layer 'counts'"
    )
    with pytest.raises(ESAMTypeError, match=message):
        model.compile(ESAM("sgd"), cross_entropy())


@pytest.mark.backends("torch")
def test_a_failed_step_restores_torchs_generator():
    import torch

    class Fails(keras.layers.Layer):
        def call(self, x):
            if fail:
                raise RuntimeError("now")
            return x

    fail = False
    model = with_dropout()
    model.add(Fails())
    model.compile(ESAM("sgd"), cross_entropy())
    model.train_on_batch(X, Y)
    before, state = weights(model), torch.get_rng_state()
    fail = True
    with pytest.raises(RuntimeError, match="now"):
        model.train_on_batch(X, Y)
    same(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)
