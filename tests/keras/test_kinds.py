"""Models and scripts with former problems: each trains correctly, or is an error."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import cross_entropy, data, mlp, same, weights

from esam_core import ESAMTypeError, ESAMValueError
from esam_keras import ESAM, Everything, Part, RandomSuffix

BACKEND = keras.backend.backend()
X, Y = data(16)


def fitted(build, optimizer, x=X, y=Y, loss=None, **kwargs):
    keras.utils.set_random_seed(3)
    model = build()
    model.compile(optimizer, loss or cross_entropy())
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, **kwargs)
    return model


# -- weights that a call assigns -------------------------------------------------------------------


def normalised():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.SpectralNormalization(keras.layers.Dense(8, activation="tanh")),
            keras.layers.SpectralNormalization(keras.layers.Dense(3)),
        ]
    )


def test_assignments_to_trained_weights_are_kept():
    plain = fitted(normalised, keras.optimizers.SGD(0.1), epochs=2)
    esam = fitted(normalised, ESAM(keras.optimizers.SGD(0.1), rho=0.0), epochs=2)
    same(weights(esam), weights(plain))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_perturbation_starts_from_the_assigned_weights(gamma):
    settings = {"rho": 1e-6, "gamma": gamma, "perturb": Everything()}
    if gamma < 1.0:  # every sample twice: each half has the gradient of all samples
        x, y = np.concatenate([X[:4], X[:4]]), np.concatenate([Y[:4], Y[:4]])
    else:
        x, y = X, Y
    esam = fitted(normalised, ESAM(keras.optimizers.SGD(0.1), **settings), x, y)
    plain = fitted(normalised, keras.optimizers.SGD(0.1), x, y)
    if gamma == 1.0:
        for a, b in zip(weights(esam), weights(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    kernel = esam.get_weights()[0]
    assert np.isfinite(kernel).all()
    if BACKEND != "jax":  # whose trainer drops the assigned kernel
        assert np.linalg.svd(kernel)[1][0] < 2.0


# -- fixed batch sizes ------------------------------------------------------------------


def stateful():
    return keras.Sequential(
        [
            keras.Input(batch_shape=(8, 3, 2)),
            keras.layers.GRU(6, stateful=True, name="memory"),
            keras.layers.Dense(3),
        ]
    )


def of_eight():
    layers = [keras.layers.Reshape((3, 2)), keras.layers.Flatten(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input(batch_shape=(8, 6)), *layers])


@pytest.mark.parametrize(("build", "shape"), [(stateful, (16, 3, 2)), (of_eight, (16, 6))])
def test_a_fixed_batch_size_trains_with_all_samples(build, shape):
    x = X.reshape(shape)
    base = fitted(build, ESAM(keras.optimizers.SGD(0.1), rho=0.0), x)
    if not (BACKEND == "torch" and build is stateful):  # Keras itself cannot train it on torch
        same(weights(base), weights(fitted(build, keras.optimizers.SGD(0.1), x)))
    perturbed = fitted(build, ESAM(keras.optimizers.SGD(0.1), rho=0.5, gamma=1.0), x)
    assert any((a != b).any() for a, b in zip(weights(perturbed), weights(base), strict=True))


def test_a_stateful_layer_is_refused_with_a_selection():
    model = stateful()
    model.compile(ESAM("sgd"), cross_entropy())
    before = weights(model)
    with pytest.raises(ESAMValueError, match=r"gamma=1\.0.*the stateful layer 'memory'"):
        model.fit(X.reshape(16, 3, 2), Y, batch_size=8, verbose=0)
    same(weights(model), before)


class Eight(keras.layers.Layer):
    """A layer that runs only on eight samples."""

    def call(self, x):
        if x.shape[0] != 8:
            raise ValueError("eight, please")
        return x

    def compute_output_shape(self, shape):
        return shape


def test_an_input_with_a_fixed_batch_size_is_refused_with_a_selection():
    model = keras.Sequential(
        [keras.Input(batch_shape=(8, 6), name="of_eight"), Eight(), keras.layers.Dense(3)]
    )
    model.compile(ESAM("sgd"), cross_entropy())
    with pytest.raises(ESAMValueError, match=r"the input 'of_eight' of shape \(8, 6\)"):
        model.fit(X, Y, batch_size=8, verbose=0)


def test_a_loss_is_tested_on_batches_of_the_users_size():
    sizes = set()

    class Mine(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            sizes.add(y.shape[0])
            values = ops.mean(ops.square(y_pred), axis=-1)
            return ops.mean(values if sample_weight is None else values * sample_weight)

    model = Mine(mlp().layers)
    model.compile(ESAM("sgd", gamma=1.0), cross_entropy(), run_eagerly=True)
    model.fit(X, Y, batch_size=8, verbose=0)
    assert sizes == {8}


@pytest.mark.backends("tensorflow")
def test_sparse_inputs():
    import tensorflow as tf

    x = tf.sparse.from_dense(np.eye(20, dtype="float32")[:8])
    batches = tf.data.Dataset.from_tensor_slices((x, np.arange(8) % 2)).batch(4)

    def trained(optimizer):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(4, "relu"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((20,), sparse=True), *layers])
        model.compile(optimizer, cross_entropy())
        model.fit(batches, verbose=0, shuffle=False)
        return weights(model)

    plain = trained(keras.optimizers.SGD(0.1))
    same(trained(ESAM(keras.optimizers.SGD(0.1), rho=0.0)), plain)
    found = trained(ESAM(keras.optimizers.SGD(0.1), rho=0.5, gamma=1.0))
    assert any((a != b).any() for a, b in zip(found, plain, strict=True))
    with pytest.raises(ESAMValueError, match=r"sparse tensor.*gamma=1\.0"):
        trained(ESAM("sgd"))


# -- scripts ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_training_a_frozen_model_changes_nothing():
    def frozen():
        model = mlp()
        model.trainable = False
        return model

    with pytest.warns(UserWarning, match="no trainable weights"):
        model = fitted(frozen, ESAM("sgd"))
    keras.utils.set_random_seed(3)
    same(weights(model), weights(mlp()))
    logs = model.train_on_batch(X, Y, return_dict=True)
    expected = model.evaluate(X, Y, verbose=0)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("monitor", ["sharpness", "sample_share", "loss"])
def test_monitors_need_no_mode(monitor, tmp_path):
    stop = keras.callbacks.EarlyStopping(monitor=monitor, patience=0, min_delta=10.0)
    save = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", monitor=monitor, save_best_only=True
    )
    model = fitted(mlp, ESAM("sgd"), epochs=5, callbacks=[stop, save])
    assert len(model.history.history["loss"]) == 2
    assert (tmp_path / "best.keras").exists()


def test_monitors_of_other_models_are_unchanged():
    stop = keras.callbacks.EarlyStopping(monitor="sharpness")
    with pytest.raises(ValueError, match="mode='max'"):
        fitted(mlp, "sgd", callbacks=[stop])


class Flipped(keras.Sequential):
    """A model that changes the batch, and calls Keras's step."""

    def train_step(self, *arguments):
        *state, (x, y) = arguments
        return super().train_step(*state, (-x, y))


def test_super_train_step_runs_a_step():
    settings = {"rho": 0.5, "beta": 0.5}
    mine = fitted(lambda: Flipped(mlp().layers), ESAM(keras.optimizers.SGD(0.1), **settings))
    ours = fitted(mlp, ESAM(keras.optimizers.SGD(0.1), **settings), x=-X)
    plain = fitted(lambda: Flipped(mlp().layers), keras.optimizers.SGD(0.1))
    for a, b in zip(weights(mine), weights(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    same(weights(plain), weights(fitted(mlp, keras.optimizers.SGD(0.1), x=-X)))
    assert any((a != b).any() for a, b in zip(weights(mine), weights(plain), strict=True))
    assert int(mine.optimizer.count.numpy()) == 2


def test_a_train_step_that_drops_samples_is_refused():
    class Halved(keras.Sequential):
        def train_step(self, *arguments):
            *state, (x, y) = arguments
            return super().train_step(*state, (x[:4], y[:4]))

    with pytest.raises(ESAMValueError, match="4 samples instead of 8"):
        fitted(lambda: Halved(mlp().layers), ESAM("sgd"))


@pytest.mark.backends("tensorflow")
def test_intended_functions_do_not_warn_about_retracing(caplog):
    names = [f"d{i}" for i in range(6)]

    def build():
        layers = [keras.layers.Dense(6, name=name) for name in names]
        return keras.Sequential([keras.Input((6,)), *layers])

    with caplog.at_level("WARNING", logger="tensorflow"):
        model = build()
        model.compile(ESAM("sgd", perturb=RandomSuffix(tuple(names))), "mse", jit_compile=False)
        x, _ = data(240)
        model.fit(x, x, batch_size=8, verbose=0)
    assert "retracing" not in caplog.text


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "nonsense"])
def test_arguments_of_the_base_optimizer_get_a_hint(name):
    with pytest.raises(ESAMTypeError, match=rf"`{name}` is not an argument of ESAM"):
        ESAM("sgd", **{name: 0.1})
    if name != "nonsense":
        with pytest.raises(ESAMTypeError, match=rf"keras\.optimizers\.SGD\({name}=0\.1\)"):
            ESAM("sgd", **{name: 0.1})


def test_arguments_of_the_pytorch_package_get_a_hint():
    with pytest.raises(ESAMTypeError, match=r"no model: pass ESAM\(\.\.\.\) to model\.compile"):
        ESAM("sgd", mlp())
    with pytest.raises(ESAMTypeError, match=r"only `base_optimizer` by position\. .*float"):
        ESAM("sgd", 0.1)
    with pytest.raises(ESAMTypeError, match=r"`budget` is not .*esam_keras\.unit_records"):
        ESAM("sgd", budget=1.2)


def test_repr():
    text = repr(ESAM("sgd", perturb=Everything(), gamma=1.0, ascend=Part(0.25)))
    assert text.startswith("ESAM(SGD, rho=0.05, perturb=Everything(), ")
    assert "ascend=Part(share=0.25)" in text
