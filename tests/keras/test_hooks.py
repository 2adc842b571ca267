"""Hooks on torch's parameters: they run once per step, with the gradient of the update."""

import keras
import numpy as np
import pytest
from tests.keras.scene import close, cross_entropy, data, mlp, same, weights

from esam_keras import ESAM, Everything, Part, Previous, Proportional

pytestmark = pytest.mark.backends("torch")

X, Y = data(16)
SAM = {"rho": 0.5, "perturb": Everything(), "gamma": 1.0}
SETTINGS = [
    {"rho": 0.0, "beta": 1.0, "gamma": 1.0},
    SAM,
    {**SAM, "ascend": Part(0.5)},
    {"rho": 0.5, "perturb": Everything(), "select": Proportional(0.5), "ascend": Previous()},
]
IDS = ["rho=0", "SAM", "Part", "Previous"]
REGISTER = ["register_hook", "register_post_accumulate_grad_hook"]


def trained(optimizer, register, hook, steps=3):
    """Return a model after some steps with a hook on its first kernel."""
    keras.utils.set_random_seed(0)
    model = mlp()
    getattr(model.layers[0].kernel.value, register)(hook)
    model.compile(optimizer, cross_entropy())
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return model


def double(given):
    """Double a gradient, given itself or the parameter that has it."""
    if given.grad is None:
        return 2.0 * given
    given.grad.mul_(2.0)
    return None


@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_a_hook_runs_once_per_step(settings, register):
    calls = []
    model = trained(ESAM("sgd", **settings), register, calls.append)
    assert len(calls) == 3
    assert model.layers[0].kernel.value.grad is None


@pytest.mark.parametrize("register", REGISTER)
def test_a_hook_changes_the_update_as_in_plain_keras(register):
    sgd = {"learning_rate": 0.1, "momentum": 0.9}
    plain = trained(keras.optimizers.SGD(**sgd), register, double)
    model = trained(ESAM(keras.optimizers.SGD(**sgd), **SETTINGS[0]), register, double)
    close(weights(model), weights(plain))
    without = trained(keras.optimizers.SGD(**sgd), "register_hook", lambda _: None)
    assert np.abs(weights(without)[0] - weights(plain)[0]).max() > 1e-3


def test_a_hook_gets_the_descent_gradient():
    """The perturbation is that without a hook."""
    seen = []
    hooked = trained(ESAM("sgd", **SAM), "register_hook", lambda g: seen.append(g) or 0.0 * g, 1)
    without = trained(ESAM(keras.optimizers.SGD(1.0), **SAM), "register_hook", lambda _: None, 1)
    keras.utils.set_random_seed(0)
    start = weights(mlp())
    same(weights(hooked)[:1], start[:1])
    close([start[0] - seen[0].numpy()], weights(without)[:1])
    norms = [float(m.optimizer.report.gradient_norm) for m in (hooked, without)]
    assert norms[0] == norms[1] > 0.0


def test_noise_of_a_hook_differs_in_each_step():
    import torch

    seen = []
    hook = lambda g: seen.append(torch.randn_like(g))  # noqa: E731
    trained(ESAM("sgd", **SAM), "register_hook", hook)
    assert not torch.equal(seen[0], seen[1])


def test_what_a_hook_makes_of_a_gradient_is_checked():
    optimizer = ESAM("sgd", **SAM, on_nonfinite="skip")
    model = trained(optimizer, "register_hook", lambda g: g * np.inf, 1)
    keras.utils.set_random_seed(0)
    same(weights(model), weights(mlp()))
    assert model.optimizer.report.skipped


def test_a_hook_that_raises_leaves_the_weights():
    def fail(_):
        raise RuntimeError("mine")

    model = mlp()
    model.layers[0].kernel.value.register_hook(fail)
    model.compile(ESAM("sgd", **SAM), cross_entropy())
    before = weights(model)
    with pytest.raises(RuntimeError, match="mine"):
        model.train_on_batch(X, Y)
    same(weights(model), before)


def test_hooks_of_wrapped_modules_and_sparse_gradients():
    import torch

    module = torch.nn.Sequential(torch.nn.Embedding(5, 3, sparse=True), torch.nn.Flatten())
    calls = []
    module[0].weight.register_hook(lambda g: calls.append(g.is_sparse))
    wrapper = keras.layers.TorchModuleWrapper(module, output_shape=(None, 6))
    inputs = keras.Input((2,), dtype="int32")
    model = keras.Model(inputs, keras.layers.Dense(3)(wrapper(inputs)))
    model.compile(ESAM("sgd", **SAM), cross_entropy())
    model.train_on_batch(np.arange(8).reshape(4, 2) % 5, Y[:4])
    assert calls == [True]
