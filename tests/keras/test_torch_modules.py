"""Wrapped torch modules that keep their parameters in more places than usual."""

import keras
import numpy as np
import pytest
from tests.keras.scene import close, data, same, weights

from esam_core import ESAMRuntimeError
from esam_keras import ESAM, Previous

pytestmark = pytest.mark.backends("torch")

X, _ = data(16)
TARGETS = X[:, :1].copy()


def projection(keep):
    """Return a module that reads its parameters from what `keep` made of them."""
    import torch

    class Projection(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(0.1 * torch.ones(6, 5))
            self.bias = torch.nn.Parameter(torch.zeros(5))
            self.kept = keep(self.weight, self.bias)

        def forward(self, x):
            weight, bias = self.kept.values() if isinstance(self.kept, dict) else self.kept
            return torch.tanh(x @ weight + bias)

    return Projection()


def lstm():
    """Return a module with torch's LSTM, which has a list of its weights."""
    import torch

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(2, 5, batch_first=True)

        def forward(self, x):
            return self.lstm(x.reshape(-1, 3, 2))[0][:, -1]

    torch.manual_seed(0)
    return Last()


def trained(module, optimizer):
    keras.utils.set_random_seed(0)
    wrapper = keras.layers.TorchModuleWrapper(module, output_shape=(None, 5))
    model = keras.Sequential([keras.Input((6,)), wrapper, keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    for _ in range(2):
        model.train_on_batch(X, TARGETS)
    return weights(model)


def sgd():
    return keras.optimizers.SGD(0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: projection(lambda weight, bias: [weight, bias]),
        lambda: projection(lambda weight, bias: {"weight": weight, "bias": bias}),
        lstm,
    ],
    ids=["list", "dictionary", "LSTM"],
)
def test_lists_and_dictionaries_of_parameters(make):
    plain = trained(make(), sgd())
    close(trained(make(), ESAM(sgd(), rho=0.0, beta=1.0, gamma=1.0)), plain, rtol=1e-5)
    module = make()
    before = dict(module.named_parameters())
    sam = trained(module, ESAM(sgd(), rho=0.5, beta=1.0, gamma=1.0))
    assert all(np.abs(a - b).max() > 1e-6 for a, b in zip(sam, plain, strict=True))
    assert all(p is before[name] for name, p in module.named_parameters())


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_other_references_to_parameters_are_refused(gamma):
    def pair(weight, bias):
        return weight, bias

    assert np.abs(trained(projection(pair), sgd())[0] - 0.1).max() > 1e-6
    module = projection(pair)
    wrapper = keras.layers.TorchModuleWrapper(module, output_shape=(None, 5))
    model = keras.Sequential([keras.Input((6,)), wrapper, keras.layers.Dense(1)])
    model.compile(ESAM(sgd(), beta=1.0, gamma=gamma), "mse")
    before = weights(model)
    for _ in range(2):
        with pytest.raises(ESAMRuntimeError, match=r"a reference to .* \('(weight|bias)'\)"):
            model.train_on_batch(X, TARGETS)
    same(weights(model), before)


def test_a_reference_to_the_value_of_a_keras_weight_is_refused():
    class Own(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")
            self.kept = (self.kernel.value,)

        def call(self, x):
            return x @ self.kept[0]

    model = keras.Sequential([keras.Input((6,)), Own(name="own"), keras.layers.Dense(1)])
    model.compile(ESAM(sgd()), "mse")
    with pytest.raises(ESAMRuntimeError, match=r"a reference to .*own/kernel"):
        model.train_on_batch(X, TARGETS)


def test_a_module_in_half_precision_with_an_earlier_direction():
    """The direction is in float32; the weights keep their dtype while they are perturbed."""
    import torch

    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 1, dtype=torch.bfloat16)
    wrapper = keras.layers.TorchModuleWrapper(linear, dtype="bfloat16")
    model = keras.Sequential([keras.Input((6,)), wrapper])
    model.compile(ESAM("sgd", beta=1.0, gamma=1.0, ascend=Previous()), "mse")
    for _ in range(2):
        model.train_on_batch(X, TARGETS)
    assert model.optimizer.report.perturbed
