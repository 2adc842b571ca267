"""One step on a fixed batch: its result or its error. A model with a loss of its own."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import RHO, Oracle, close, data, same, trainable, weights

from esam_core import ESAMValueError
from esam_keras import ESAM

X, Y = data()


ONE_HOT = np.eye(3, dtype="float32")[Y]


def esam(gamma=0.5, **kwargs):
    chosen = {} if "select" in kwargs else {"gamma": gamma}
    return ESAM(keras.optimizers.SGD(0.1), **{"rho": RHO, "beta": 1.0, **chosen, **kwargs})


def step(model, settings, batch, gamma=0.5, **kwargs):
    """Run one step of `train_on_batch`; return the report."""
    model.compile(esam(gamma, **kwargs), **settings)
    model.train_on_batch(*batch)
    return model.optimizer.report


class OwnComputeLoss(keras.Model):
    """Weights its own formula by `sample_weight`."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(8, activation="tanh")
        self.head = keras.layers.Dense(3)

    def call(self, x):
        return self.head(self.first(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        values = ops.mean(ops.square(ops.subtract(y, y_pred)), axis=-1)
        if sample_weight is not None:
            values = values * sample_weight
        return self.total(values, sample_weight) + 0.1 * ops.mean(ops.square(self.head.kernel))

    def total(self, values, sample_weight):
        return ops.mean(values)


def check(model, settings, batch, scale=1.0, losses_scale=1.0):
    """Compare selection, losses and weights with those of plain Keras for single samples."""
    before = weights(model)
    oracle = Oracle(model, settings, batch)
    singles, chosen = oracle.single_losses(trainable(model)), oracle.selected()
    expected, expected_sam = oracle.esam(scale=scale), oracle.sam()
    report = step(model, settings, batch)
    np.testing.assert_array_equal(ops.convert_to_numpy(report.indices), chosen)
    np.testing.assert_allclose(
        ops.convert_to_numpy(report.losses), losses_scale * singles, rtol=2e-5, atol=1e-6
    )
    close(trainable(model), expected)
    model.set_weights(before)
    step(model, settings, batch, gamma=1.0)
    close(trainable(model), expected_sam)


def refusal(model, settings, batch, match, rows=6, **kwargs):
    """Require an error in both ways of training, without changes of the weights."""
    before = weights(model)
    model.compile(esam(**kwargs), **settings)
    with pytest.raises(ESAMValueError, match=match):
        model.fit(*batch, batch_size=rows, verbose=0)
    same(weights(model), before)
    with pytest.raises(ESAMValueError, match=match):
        model.train_on_batch(*batch)
    same(weights(model), before)
    model.predict(batch[0], verbose=0)
