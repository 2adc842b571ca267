"""Warnings point at the user's line."""

import keras
import pytest
from tests.keras.scene import data

from esam_keras import ESAM


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_model_without_trainable_weights(how, run_eagerly):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Activation("tanh")])
    model.compile(ESAM("sgd"), "mse", run_eagerly=run_eagerly)
    x, _ = data()
    with pytest.warns(UserWarning, match="no trainable weights") as found:
        getattr(model, how)(x, x)
    (warning,) = [w for w in found if "no trainable weights" in str(w.message)]
    assert warning.filename == __file__
