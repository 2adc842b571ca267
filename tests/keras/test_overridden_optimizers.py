"""Base optimizers that override a method of Keras: it is called where Keras calls it."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import close, cross_entropy, data, mlp, weights

from esam_keras import ESAM, Everything, Part, Previous

X, Y = data(16)
BACKEND = keras.backend.backend()


def centralised(pairs):
    """Gradient centralisation."""
    return [(g - ops.mean(g, axis=0) if len(g.shape) > 1 else g, v) for g, v in pairs]


class ByGradients(keras.optimizers.SGD):
    """Overrides what Keras's TensorFlow trainer calls."""

    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients(centralised(grads_and_vars))


class ByApply(keras.optimizers.SGD):
    """Overrides what Keras calls on every backend."""

    def apply(self, grads, trainable_variables=None):
        variables = self._trainable_variables if trainable_variables is None else None
        pairs = list(zip(grads, variables or trainable_variables, strict=True))
        super().apply([g for g, _ in centralised(pairs)], trainable_variables)


def trained(optimizer, **compile_arguments):
    keras.utils.set_random_seed(0)
    model = mlp()
    model.compile(optimizer, cross_entropy(), **compile_arguments)
    model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("kind", [ByGradients, ByApply])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_an_override_is_used_as_in_plain_keras(kind, run_eagerly):
    plain = trained(kind(0.5), run_eagerly=run_eagerly)
    model = trained(ESAM(kind(0.5), rho=0.0), run_eagerly=run_eagerly)
    close(weights(model), weights(plain))
    sgd = trained(keras.optimizers.SGD(0.5), run_eagerly=run_eagerly)
    changes = np.abs(weights(sgd)[0] - weights(plain)[0]).max() > 1e-3
    assert changes == (kind is ByApply or BACKEND == "tensorflow")


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("outside", [True, False])
def test_with_a_loss_scaler_it_is_used_as_in_plain_keras(outside):
    def scaled(optimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)

    plain = trained(scaled(ByGradients(0.5)))
    if outside:
        model = trained(scaled(ESAM(ByGradients(0.5), rho=0.0)))
    else:
        model = trained(ESAM(scaled(ByGradients(0.5)), rho=0.0))
    close(weights(model), weights(plain))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("ascend", [None, Part(0.5), Previous()], ids=["batch", "part", "previous"])
def test_it_gets_the_descent_gradient(ascend):
    settings = {"rho": 0.5, "perturb": Everything(), "gamma": 1.0, "ascend": ascend}
    by_gradients = trained(ESAM(ByGradients(0.5), **settings))
    by_apply = trained(ESAM(ByApply(0.5), **settings))
    close(weights(by_gradients), weights(by_apply))
    assert np.abs(weights(by_gradients)[0] - weights(trained(ByGradients(0.5)))[0]).max() > 1e-3
