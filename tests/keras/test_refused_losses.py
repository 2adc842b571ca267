"""Losses that have no value per sample or are not linear in their weights."""

import keras
import pytest
from keras import ops
from tests.keras.scene import Oracle, close, cross_entropy, mlp, trainable
from tests.keras.stepping import ONE_HOT, OwnComputeLoss, X, Y, refusal, step


def test_a_loss_that_is_not_linear_in_the_weights_is_refused():
    class Squares(OwnComputeLoss):
        def total(self, values, sample_weight):
            return ops.sqrt(ops.mean(ops.square(values)))

    model = Squares()
    model(X)
    refusal(model, {}, (X, ONE_HOT), "is not linear in `sample_weight`")


def test_a_loss_that_ignores_the_weights_is_refused():
    class Ignores(OwnComputeLoss):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(ops.square(ops.subtract(y, y_pred)))

    model = Ignores()
    model(X)
    refusal(model, {}, (X, ONE_HOT), "does not depend on `sample_weight`")


class Standing(keras.losses.Loss):
    """A loss with its own reduction."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        return ops.sqrt(super().__call__(y_true, y_pred, sample_weight) + 1.0)

    def call(self, y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred), axis=-1)


def test_a_loss_object_that_is_not_linear_is_refused():
    refusal(mlp(), {"loss": Standing()}, (X, ONE_HOT), "is not linear")


def scalar_loss(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))


@pytest.mark.parametrize("loss", [keras.losses.Dice(), scalar_loss], ids=["dice", "scalar"])
def test_losses_without_a_value_per_sample(loss):
    model = mlp(activation="sigmoid")
    refusal(model, {"loss": loss}, (X, ONE_HOT), "value for each sample")
    expected = Oracle(model, {"loss": loss}, (X, ONE_HOT)).sam()
    step(model, {"loss": loss}, (X, ONE_HOT), gamma=1.0)
    close(trainable(model), expected)


def test_a_loss_that_is_not_one_number_is_refused():
    refusal(mlp(), {"loss": cross_entropy(reduction=None)}, (X, Y), "must be one number")
