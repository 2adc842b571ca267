"""What only TensorFlow has: methods compiled by `tf.function`, and its own variables."""

import keras
import numpy as np
import pytest
from tests.keras.scene import cross_entropy, data, same, weights

from esam_core import ESAMRuntimeError
from esam_keras import ESAM

pytestmark = pytest.mark.backends("tensorflow")

X, Y = data()


def with_helper(of_the_layer, used=True):
    """Return a model with a method that is compiled by `tf.function`."""
    import tensorflow as tf

    class Helped(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="helped")
            self.dense = keras.layers.Dense(8)
            if not of_the_layer:
                self.project = tf.function(self.dense)

        def call(self, x):
            return self.project(x) if used else self.dense(x)

    if of_the_layer:
        Helped.project = tf.function(lambda self, x: self.dense(x))
    return keras.Sequential([keras.Input((6,)), Helped(), keras.layers.Dense(3)])


@pytest.mark.parametrize("of_the_layer", [True, False])
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_compiled_method_that_a_pass_calls_is_refused(of_the_layer, run_eagerly):
    model = with_helper(of_the_layer)
    model.compile(ESAM("sgd"), cross_entropy(), run_eagerly=run_eagerly)
    before = weights(model)
    with pytest.raises(ESAMRuntimeError, match=r"`project` compiled by `tf\.function`.*'helped'"):
        model.fit(X, Y, verbose=0)
    same(weights(model), before)


@pytest.mark.parametrize("of_the_layer", [True, False])
def test_a_compiled_method_that_no_pass_calls_stays(of_the_layer):
    model = with_helper(of_the_layer, used=False)
    layer = model.layers[0]
    compiled = layer.project
    model.compile(ESAM("sgd"), cross_entropy())
    model.fit(X, Y, verbose=0)
    assert layer.project(X).shape == (12, 8)
    assert of_the_layer or layer.project is compiled


def test_a_compiled_method_of_a_frozen_layer_is_used():
    model = with_helper(of_the_layer=True)
    model.layers[0].trainable = False
    model.compile(ESAM("sgd"), cross_entropy())
    model.fit(X, Y, verbose=0)
    assert len(model.optimizer.report.losses) == 12


@pytest.mark.parametrize("kind", ["text", "numbers"])
def test_preprocessing_layers_of_keras_inside_the_model(kind):
    import tensorflow as tf

    if kind == "text":
        layer = keras.layers.TextVectorization(output_mode="tf_idf", max_tokens=6)
        layer.adapt(["a b c", "b c", "d e"])
        x, entry = tf.constant(["a b", "b", "d a", "c"]), keras.Input((), dtype="string")
    else:
        layer = keras.layers.IntegerLookup(output_mode="tf_idf", max_tokens=6)
        layer.adapt(np.array([[1], [2], [3]]))
        x, entry = np.array([[1], [2], [3], [1]]), keras.Input((1,), dtype="int64")
    model = keras.Model(entry, keras.layers.Dense(3)(layer(entry)))
    model.compile(ESAM("sgd"), cross_entropy())
    assert "sharpness" in model.fit(x, Y[:4], verbose=0).history
