"""Which weights are trained: those that plain Keras trains on each backend."""

import keras
import numpy as np
import pytest
from tests.keras.scene import close, data, mlp, same, trainable, weights

from esam_core import ESAMRuntimeError
from esam_keras import ESAM, Everything, Momentum, Part, Previous, Suffix, unit_records

X, _ = data(16)
TARGETS = X[:, :1].copy()
SAM = {"rho": 0.5, "perturb": Everything(), "gamma": 1.0}
SETTINGS = [
    {"rho": 0.0, "beta": 1.0, "gamma": 1.0},
    SAM,
    {"rho": 0.5, "beta": 1.0, "gamma": 0.5},
    {**SAM, "ascend": Part(0.5)},
    {**SAM, "ascend": Previous()},
    {**SAM, "ascend": Momentum()},
]
IDS = ["rho=0", "SAM", "gamma=0.5", "Part", "Previous", "Momentum"]


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)


class OnlyTheHead(keras.Model):
    """Trains only its head, in the way of Keras's TensorFlow and torch trainers."""

    def __init__(self):
        super().__init__()
        self.stem = keras.layers.Dense(4, name="stem")
        self.head = keras.layers.Dense(1, name="head")

    def build(self, shape):
        self.stem.build(shape)
        self.head.build((None, 4))
        self.built = True

    def call(self, x):
        return self.head(self.stem(x))

    @property
    def trainable_weights(self):
        return self.head.trainable_weights


def trained(model, optimizer, steps=3, **compile_arguments):
    """Return a model after some steps, and its weights before them."""
    if not model.built:
        model.build((None, 6))
    model.compile(optimizer, "mse", **compile_arguments)
    before = weights(model)
    for _ in range(steps):
        model.train_on_batch(X, TARGETS)
    return model, before


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_weights_that_the_model_excludes_stay(settings):
    plain, before = trained(OnlyTheHead(), sgd())
    same(weights(plain)[:2], before[:2])
    keras.utils.set_random_seed(0)
    model, before = trained(OnlyTheHead(), ESAM(sgd(), **settings))
    same(weights(model)[:2], before[:2])
    assert all("head" in name for name in model.optimizer.report.perturbed)
    if settings["rho"] == 0.0:
        close(weights(model), weights(plain))
    else:
        assert model.optimizer.report.weight_share == 1.0
        assert np.abs(weights(model)[2] - weights(plain)[2]).max() > 1e-6
    assert [unit.block for unit in unit_records(model)] == ["head", "head"]


@pytest.mark.backends("jax")
def test_jax_trains_what_keras_trains_there():
    plain, before = trained(OnlyTheHead(), sgd())
    assert np.abs(weights(plain)[0] - before[0]).max() > 1e-3  # `trainable_variables`
    keras.utils.set_random_seed(0)
    model, _ = trained(OnlyTheHead(), ESAM(sgd(), **SETTINGS[0]))
    close(weights(model), weights(plain))


# -- frozen by torch ------------------------------------------------------------------------------


def network():
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, name="stem"), keras.layers.Dense(1, name="head")]
    )


def freeze(model, *, frozen=True):
    for variable in model.layers[0].trainable_variables:
        variable.value.requires_grad_(not frozen)
    return model


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of plain Keras
@pytest.mark.backends("torch")
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_weights_frozen_by_torch_stay(settings):
    plain, before = trained(freeze(network()), sgd())
    same(weights(plain)[:2], before[:2])
    keras.utils.set_random_seed(0)
    model, before = trained(freeze(network()), ESAM(sgd(), **settings))
    same(weights(model)[:2], before[:2])
    assert not any(v.value.requires_grad for v in model.layers[0].variables)
    assert all("head" in name for name in model.optimizer.report.perturbed)
    if settings["rho"] == 0.0:
        close(weights(model), weights(plain))
    else:
        assert model.optimizer.report.weight_share == 1.0
    assert [unit.block for unit in unit_records(model)] == ["head", "head"]


@pytest.mark.backends("torch")
def test_a_wrapped_module_frozen_after_wrapping_stays():
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh())
    wrapper = keras.layers.TorchModuleWrapper(module, output_shape=(None, 5))
    model = keras.Sequential([keras.Input((6,)), wrapper, keras.layers.Dense(1)])
    module.requires_grad_(False)
    model, before = trained(model, ESAM(sgd(), **SAM))
    same(weights(model)[:2], before[:2])
    assert not any(p.requires_grad for p in module.parameters())
    assert len(model.optimizer.report.perturbed) == 2


@pytest.mark.backends("torch")
@pytest.mark.parametrize("ascend", [None, Previous()], ids=["batch", "Previous"])
def test_torch_may_unfreeze_weights_later(ascend):
    model, before = trained(freeze(network()), ESAM(sgd(), **SAM, ascend=ascend))
    freeze(model, frozen=False)
    model.train_on_batch(X, TARGETS)
    assert np.abs(weights(model)[0] - before[0]).max() > 1e-6
    assert len(model.optimizer.report.perturbed) == 4


@pytest.mark.backends("torch")
def test_previous_refuses_weights_whose_gradient_it_does_not_keep():
    def esam():
        return ESAM(sgd(), rho=0.5, perturb=Suffix(0.5), gamma=1.0, ascend=Previous())

    model, _ = trained(freeze(mlp(1)), esam())
    assert [name.split("/")[-2] for name in model.optimizer.report.perturbed] == ["head", "head"]
    freeze(model, frozen=False)  # now half of the network is longer
    before = weights(model)
    for _ in range(2):
        with pytest.raises(ESAMRuntimeError, match=r"compiled again.*perturb .*second/kernel"):
            model.train_on_batch(X, TARGETS)
    same(weights(model), before)
    model, _ = trained(model, esam())
    assert len(model.optimizer.report.perturbed) == 4


# -- frozen after `compile` -------------------------------------------------------------------


@pytest.mark.backends("jax")
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("train", ["fit", "train_on_batch"])
def test_freezing_after_compile_is_refused(settings, train):
    model, _ = trained(network(), ESAM(sgd(), **settings))
    model.layers[0].trainable = False
    before = trainable(model)
    with pytest.raises(ESAMRuntimeError, match=r"compiled again.*not train .*stem/kernel"):
        getattr(model, train)(X, TARGETS)
    same(trainable(model), before)
    model.compile(ESAM(sgd(), **settings), "mse")
    model.train_on_batch(X, TARGETS)


def test_a_frozen_model_and_a_loss_without_values_per_sample():
    """Keras does nothing, so we do."""
    model = mlp()
    model.trainable = False
    before = weights(model)
    loss = lambda y, outputs: keras.ops.mean(keras.ops.square(outputs - y))  # noqa: E731
    model.compile(ESAM("sgd", gamma=1.0), loss)
    with pytest.warns(UserWarning, match="no trainable weights"):
        model.fit(data()[0], np.ones((12, 3)), verbose=0)
    same(weights(model), before)
