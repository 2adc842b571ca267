"""Any Keras optimizer as the base optimizer, with all its features."""

from dataclasses import fields

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import (
    Oracle,
    assign,
    close,
    cross_entropy,
    data,
    mlp,
    same,
    trainable,
    weights,
)

from esam_core import (
    ESAMConfig,
    ESAMRuntimeError,
    ESAMTypeError,
    ESAMValueError,
    NonFiniteError,
)
from esam_keras import ESAM, Every, Everything

X, Y = data(16)
SCHEDULE = keras.optimizers.schedules

BASES = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "nesterov": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "schedule": lambda: keras.optimizers.SGD(SCHEDULE.ExponentialDecay(0.1, 1, 0.5)),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.05),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.05),
    "decay": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
    "ema overwrites": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "accumulates": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=128.0),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
}


def fit(optimizer, epochs=2, **kwargs):
    keras.utils.set_random_seed(5)
    model = mlp()
    model.compile(optimizer, cross_entropy(), **kwargs)
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("name", BASES)
def test_with_rho_0_it_equals_the_base_optimizer_bit_for_bit(name):
    plain, ours = fit(BASES[name]()), fit(ESAM(BASES[name](), rho=0.0))
    same(trainable(ours), trainable(plain))
    for a, b in zip(
        ours.optimizer.base_optimizer.variables, plain.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


@pytest.mark.parametrize("name", ["adam", "clipnorm", "decay", "ema", "accumulates"])
def test_the_base_gets_the_descent_gradients(name):
    # SAM's and the plain gradient alternately, one per step.
    ours = fit(ESAM(BASES[name](), rho=0.3, perturb=Every(2, Everything()), gamma=1.0), epochs=1)
    keras.utils.set_random_seed(5)
    model = mlp()
    base = BASES[name]()
    base.build(model.trainable_variables)
    for count in range(4):
        batch = X[4 * count : 4 * count + 4], Y[4 * count : 4 * count + 4]
        oracle = Oracle(model, {"loss": cross_entropy()}, batch)
        theta = trainable(model)
        where = theta if count % 2 else oracle.climbed(0.3)
        g = [ops.convert_to_tensor(a, dtype="float32") for a in oracle.gradient(where, batch)]
        assign(model, theta)
        base.apply(g, model.trainable_variables)
    if base.use_ema:
        base.finalize_variable_values(model.trainable_variables)
    close(trainable(ours), trainable(model), rtol=2e-3, atol=2e-5)


def test_callbacks_read_attributes_of_the_base_optimizer():
    base = keras.optimizers.SGD(0.1, use_ema=True, clipnorm=1.0)
    optimizer = ESAM(base)
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    optimizer.learning_rate = 0.05
    assert float(base.learning_rate) == pytest.approx(0.05)
    assert optimizer.use_ema and optimizer.clipnorm == 1.0
    model = mlp()
    model.compile(optimizer, cross_entropy())
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    assert int(optimizer.iterations) == int(base.iterations) == 8
    ours = {id(v) for v in optimizer.variables}
    assert {id(v) for v in base.variables} < ours
    assert not {id(v) for v in model.trainable_variables} & ours


def test_frozen_layers_stay():
    model = mlp()
    model.layers[0].trainable = False
    before = weights(model)[:2]
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.3, beta=1.0), cross_entropy())
    model.fit(X, Y, verbose=0)
    same(weights(model)[:2], before)
    assert not any("first" in name for name in model.optimizer.report.perturbed)


def test_a_variable_that_the_loss_does_not_use():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(3)(hidden), keras.layers.Dense(2)(hidden)])
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.3, beta=1.0), [cross_entropy(), None])
    unused = weights(model)[4:]
    if keras.backend.backend() == "jax":
        model.train_on_batch(X, [Y, np.zeros((16, 2))])
    else:
        with pytest.warns(UserWarning, match="Gradients do not exist"):  # as Keras has it
            model.train_on_batch(X, [Y, np.zeros((16, 2))])
    same(weights(model)[4:], unused)


def test_embeddings_have_sparse_gradients():
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(20, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    x = np.arange(48).reshape(16, 3) % 10
    before = weights(model)[0]
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.3, beta=1.0, gamma=0.5), cross_entropy())
    model.train_on_batch(x, Y)
    np.testing.assert_array_equal(weights(model)[0][10:], before[10:])
    assert np.abs(weights(model)[0][:10] - before[:10]).max() > 0
    np.testing.assert_allclose(float(model.optimizer.report.perturbation_norm), 0.3, rtol=1e-5)


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
@pytest.mark.parametrize("auto_scale_loss", [True, False])
def test_mixed_precision_trains(policy, auto_scale_loss):
    model = mlp()
    model.compile(
        ESAM(keras.optimizers.SGD(0.2, momentum=0.9), rho=0.1),
        cross_entropy(),
        auto_scale_loss=auto_scale_loss,
    )
    scaled = policy == "mixed_float16" and auto_scale_loss
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == scaled
    history = model.fit(X, Y, batch_size=8, epochs=6, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["sharpness"][0] < 2.0  # of the unscaled loss
    assert all(v.dtype == "float32" for v in model.trainable_variables)


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_the_scale_affects_neither_radius_nor_update():
    def after(optimizer, **kwargs):
        keras.utils.set_random_seed(5)
        model = mlp()
        model.compile(optimizer, cross_entropy(), **kwargs)
        model.train_on_batch(X, Y)
        report = (optimizer if isinstance(optimizer, ESAM) else optimizer.inner_optimizer).report
        return trainable(model), float(report.perturbation_norm), float(report.gradient_norm)

    settings = {"rho": 0.3, "beta": 1.0, "gamma": 0.5}
    plain = after(ESAM(keras.optimizers.SGD(0.1), **settings), auto_scale_loss=False)
    outside = after(ESAM(keras.optimizers.SGD(0.1), **settings))
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    inside = after(ESAM(scaler, **settings))
    for found in (outside, inside):
        close(found[0], plain[0], rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(found[1:], plain[1:], rtol=1e-2)


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_an_overflow_skips_the_update_and_halves_the_scale(where):
    def scaler(inner):
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**40)

    model = mlp()
    esam = (
        ESAM(keras.optimizers.SGD(0.1), rho=0.3)
        if where == "outside"
        else ESAM(scaler(keras.optimizers.SGD(0.1)), rho=0.3)
    )
    model.compile(scaler(esam) if where == "outside" else esam, cross_entropy())
    optimizer = model.optimizer if where == "outside" else esam.base_optimizer
    before = weights(model)
    model.train_on_batch(X, Y)
    same(weights(model), before)
    assert float(optimizer.dynamic_scale) == 2.0**39
    assert int(optimizer.iterations) == 0
    assert int(esam.count.numpy()) == 1
    for _ in range(40):
        model.train_on_batch(X, Y)
    assert all(np.isfinite(w).all() for w in weights(model))
    assert int(optimizer.iterations) > 0


def test_two_scalers_are_refused():
    scaler = keras.optimizers.LossScaleOptimizer
    with pytest.raises(ESAMTypeError, match="inside it, not both"):
        mlp().compile(scaler(ESAM(scaler(keras.optimizers.SGD(0.1)))), cross_entropy())


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_overflows_are_not_hidden_from_a_scaler(mode, where):
    scaler = keras.optimizers.LossScaleOptimizer
    base = keras.optimizers.SGD(0.1)
    optimizer = ESAM(scaler(base) if where == "inside" else base, on_nonfinite=mode)
    with pytest.raises(ESAMValueError, match="`on_nonfinite` must be 'propagate'"):
        mlp().compile(scaler(optimizer) if where == "outside" else optimizer, cross_entropy())


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_nonfinite_steps(mode, run_eagerly):
    model = mlp()
    model.compile(
        ESAM(keras.optimizers.SGD(0.1, momentum=0.9), rho=0.3, on_nonfinite=mode),
        cross_entropy(),
        run_eagerly=run_eagerly,
    )
    model.train_on_batch(X, Y)
    before, slots = (
        weights(model),
        [np.array(v.value) for v in model.optimizer.base_optimizer.variables],
    )
    bad = X.copy()
    bad[3] = np.nan
    if mode == "raise":
        with pytest.raises(NonFiniteError, match="step 1 is not finite"):
            model.fit(bad, Y, batch_size=16, verbose=0)
    else:
        history = model.fit(bad, Y, batch_size=16, verbose=0).history
        assert model.optimizer.report.skipped
        assert history["loss"] == [0.0]  # no step counted
    same(weights(model), before)
    same([np.array(v.value) for v in model.optimizer.base_optimizer.variables], slots)
    assert int(model.optimizer.count.numpy()) == (1 if mode == "raise" else 2)
    model.train_on_batch(X, Y)
    assert all(np.isfinite(w).all() for w in weights(model))


@pytest.mark.parametrize("name", [*(field.name for field in fields(ESAMConfig)), "beta", "gamma"])
def test_hyperparameters_can_be_read_but_not_assigned(name):
    esam = ESAM("sgd", rho=0.1, beta=0.5, gamma=0.25)
    values = {**vars(esam.config), "beta": 0.5, "gamma": 0.25}
    assert getattr(esam, name) == values[name]
    with pytest.raises(ESAMRuntimeError, match=f"ESAM.optimizer.base_optimizer, {name}="):
        setattr(esam, name, 0.375)


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_hyperparameters_of_the_base_are_set_there(name):
    optimizer = ESAM(keras.optimizers.SGD(0.1, momentum=0.9), rho=0.0)
    with pytest.raises(
        ESAMRuntimeError, match=rf"`{name}` is a hyperparameter of the base .*base_optimizer.{name}"
    ):
        setattr(optimizer, name, 0.5)
    optimizer.base_optimizer.momentum = 0.5
    optimizer.weight_decay = 0.25
    optimizer.note = "anything else"
    assert optimizer.base_optimizer.momentum == 0.5
    assert optimizer.base_optimizer.weight_decay == 0.25
