"""Saving and loading: a loaded model resumes exactly."""

import keras
import numpy as np
import pytest
from tests.keras.scene import cross_entropy, data, mlp, same, trainable, weights

from esam_core import ESAMValueError
from esam_keras import (
    ESAM,
    Bernoulli,
    Every,
    Momentum,
    Only,
    Part,
    Previous,
    Proportional,
    RandomSuffix,
    Suffix,
    TopLoss,
)

X, Y = data(16)


def train(model, epochs=1):
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)


def everything(model):
    return [
        np.array(keras.ops.convert_to_numpy(v.value))
        for v in (*model.variables, *model.optimizer.variables)
    ]


def normalised():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_loaded_model_continues_like_the_saved_one(tmp_path, base):
    model = normalised()
    optimizers = {"sgd": keras.optimizers.SGD(0.1, momentum=0.9), "adam": keras.optimizers.Adam()}
    model.compile(ESAM(optimizers[base], rho=0.2, beta=0.5, gamma=0.5, seed=9), cross_entropy())
    train(model, 2)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded.optimizer, ESAM)
    assert loaded.optimizer.config == model.optimizer.config
    same(everything(loaded), everything(model))
    train(model, 2)
    train(loaded, 2)
    same(everything(loaded), everything(model))
    assert loaded.optimizer.report.perturbed


def test_weights_alone(tmp_path):
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy())
    train(model)
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    other = mlp()
    other.load_weights(path)
    same(weights(other), weights(model))


@pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning")  # of the base
@pytest.mark.parametrize("optimizer", [None, "sgd", "adam"])
def test_weights_of_a_model_trained_without_esam(tmp_path, optimizer):
    first, second = mlp(), mlp()
    if optimizer:
        first.compile(optimizer, cross_entropy())
        first.fit(X, Y, verbose=0)
    first.save_weights(tmp_path / "m.weights.h5")
    second.compile(ESAM("sgd"), cross_entropy())
    with pytest.warns(UserWarning, match="The state of ESAM was not loaded"):
        second.load_weights(tmp_path / "m.weights.h5")
    same(weights(first), weights(second))
    second.fit(X, Y, verbose=0)


def test_weights_from_before_the_first_step_forget_the_direction(tmp_path):
    """The next step is a base step, and not perturbed along a gradient of later steps."""

    def perturbed(again):
        model = mlp()
        model.compile(ESAM("sgd", beta=1.0, gamma=1.0, ascend=Previous()), cross_entropy())
        model.save_weights(path := tmp_path / "start.weights.h5")
        model.fit(*data(), batch_size=4, verbose=0)
        if again:
            model.load_weights(path)
        model.train_on_batch(*data())
        return model.optimizer.report.perturbed

    assert perturbed(again=False)
    assert perturbed(again=True) == ()


def test_loading_without_compiling(tmp_path):
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy())
    train(model)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.saving.load_model(path, compile=False)
    same(weights(loaded), weights(model))
    assert not loaded.compiled


def test_models_without_esam_still_load_their_optimizer(tmp_path):
    model = mlp()
    model.compile(keras.optimizers.Adam(), cross_entropy())
    train(model)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded.optimizer) is type(model.optimizer)
    same(everything(loaded), everything(model))


def test_a_scaled_model(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = mlp()
        model.compile(ESAM(keras.optimizers.SGD(0.1, momentum=0.9)), cross_entropy())
        train(model)
        path = str(tmp_path / "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer)
        same(everything(loaded), everything(model))
        train(model)
        train(loaded)
        same(trainable(loaded), trainable(model))
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rho": 0.1, "beta": 0.7, "gamma": 0.3, "adaptive": True, "norm": "full"},
        {"perturb": Suffix("head"), "select": TopLoss(0.4), "seed": 3, "logs": False},
        {"perturb": Every(5, Only("norm", RandomSuffix(("first", "head"))))},
        {"perturb": Bernoulli(0.5, unit="weight"), "select": Proportional(0.5, score="increase")},
        {"on_nonfinite": "skip", "norm_eps": 1e-8, "name": "mine"},
        {"ascend": Part(0.25)},
        {"ascend": Momentum(1)},
    ],
)
def test_config_round_trip(arguments):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    optimizer = ESAM(keras.optimizers.SGD(schedule, momentum=0.9), **arguments)
    config = optimizer.get_config()
    again = ESAM.from_config(config)
    assert again.config == optimizer.config
    assert (again.name, again.logs) == (optimizer.name, optimizer.logs)
    assert again.base_optimizer.get_config() == optimizer.base_optimizer.get_config()
    assert again.get_config() == config
    read = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert isinstance(read, ESAM)
    assert read.config == optimizer.config


def test_a_config_from_before_there_were_directions():
    config = ESAM("sgd").get_config()
    assert config.pop("ascend") == {"name": "Batch"}
    assert ESAM.from_config(config).config == ESAM("sgd").config


def test_loading_a_sampler_that_holds_a_function_is_an_error():
    optimizer = ESAM("sgd", perturb=Only(lambda unit: unit.kind == "bias"))
    with pytest.raises(ESAMValueError, match="holds a function"):
        ESAM.from_config(optimizer.get_config())


def test_variables_can_be_set_from_a_list():
    model = mlp()
    model.compile(ESAM(keras.optimizers.SGD(0.1, momentum=0.9)), cross_entropy())
    train(model)
    saved = [np.array(v.value) for v in model.optimizer.variables]
    train(model)
    model.optimizer.set_weights(saved)
    same([np.array(v.value) for v in model.optimizer.variables], saved)
    with pytest.raises(ESAMValueError, match="one for each of `variables`"):
        model.optimizer.set_weights(saved[1:])


def test_a_cloned_model_trains():
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy())
    train(model)
    clone = keras.models.clone_model(model)
    clone.compile_from_config(model.get_compile_config())
    assert isinstance(clone.optimizer, ESAM)
    train(clone)
    assert int(clone.optimizer.count.numpy()) == 4
