"""What only TensorFlow has: methods compiled by `tf.function`, and its own variables."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import close, cross_entropy, data, same, weights

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


class Inside(keras.layers.Layer):
    """Runs its inner layer through `wrap`, which takes a function and its argument."""

    def __init__(self, wrap):
        super().__init__(name="around")
        self.dense = keras.layers.Dense(6, name="inner")
        self.wrap = wrap

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.wrap(self.dense, x)


def inside(wrap):
    layers = [keras.layers.Dense(6), Inside(wrap), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


def own_gradient(dense, x):
    """Run a layer with a gradient of its own."""
    import tensorflow as tf

    @tf.custom_gradient
    def run(x):
        kernel, bias = dense.kernel + 0.0, dense.bias + 0.0

        def gradient(upstream, variables=None):
            found = upstream @ tf.transpose(kernel)
            own = {(6, 6): tf.transpose(x) @ upstream, (6,): tf.reduce_sum(upstream, 0)}
            return (found, [own[tuple(v.shape)] for v in variables]) if variables else found

        return x @ kernel + bias, gradient

    return run(x)


@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (lambda dense, x: keras.remat(dense)(x), r"`keras\.remat`.*inner/(kernel|bias)"),
        (own_gradient, r"or `tf\.custom_gradient`.*inner/(kernel|bias)"),
        ("tf.function", r"inside a `tf\.function`.*inner/(kernel|bias)"),
        ("traced before", r"inside a `tf\.function`.*inner/(kernel|bias)"),
    ],
    ids=["remat", "own gradient", "function", "traced before"],
)
def test_reads_that_lose_the_gradient_are_refused(wrap, match, run_eagerly):
    """Plain Keras trains all of them."""
    import tensorflow as tf

    def build():
        keras.utils.set_random_seed(0)
        if not isinstance(wrap, str):
            return inside(wrap)
        compiled = tf.function(lambda dense, x: dense(x))
        model = inside(lambda dense, x: compiled(dense, x))  # not a method of the layer
        if wrap == "traced before":  # for this form of the input, with the variables themselves
            compiled(model.layers[1].dense, tf.zeros((12, 6)))
        return model

    plain = build()
    before = weights(plain)
    plain.compile("sgd", cross_entropy(), run_eagerly=run_eagerly)
    plain.fit(X, Y, verbose=0)
    assert all(np.any(a != b) for a, b in zip(weights(plain), before, strict=True))
    model = build()
    model.compile(ESAM("sgd", rho=0.1, beta=1.0), cross_entropy(), run_eagerly=run_eagerly)
    with pytest.raises(ESAMRuntimeError, match=f"(?s){match}"):
        model.fit(X, Y, verbose=0)
    same(weights(model), before)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_function_that_is_first_traced_in_a_pass_is_refused(run_eagerly):
    """It would keep the values of this pass for the others."""
    import tensorflow as tf

    # AutoGraph would raise an error of its own with the message of this one.
    compiled = tf.function(lambda dense, x: dense(x), autograph=False)
    used = False
    model = inside(lambda dense, x: compiled(dense, x) if used else dense(x))
    model.compile(ESAM("sgd", beta=1.0), cross_entropy(), run_eagerly=run_eagerly)
    model.train_on_batch(X, Y)
    before = weights(model)
    used = True
    with pytest.raises(ESAMRuntimeError, match=r"inside a `tf\.function`.*inner/(kernel|bias)"):
        model.train_on_batch(X[:10], Y[:10])
    same(weights(model), before)


@pytest.mark.parametrize("mode", ["full", "list_of_layers"])
def test_checkpointed_layers_are_refused(mode):
    with keras.RematScope(mode=mode, layer_names=["second"]):
        layers = [keras.layers.Dense(8, name="first"), keras.layers.Dense(3, name="second")]
    model = keras.Sequential([keras.Input((6,)), *layers])
    with pytest.raises(ESAMRuntimeError, match=r"in a `keras\.RematScope`"):
        model.compile(ESAM("sgd"), cross_entropy(), run_eagerly=True)


PARTS = {
    "cond": lambda dense, x: ops.cond(ops.sum(x) > -1e9, lambda: dense(x), lambda: x),
    "loop": lambda dense, x: ops.fori_loop(0, 2, lambda _, c: dense(c), x),
    "vectorized": lambda dense, x: ops.vectorized_map(lambda e: dense(e[None])[0], x),
    "argument": lambda dense, x: with_arguments(x, dense.kernel + 0.0),
}


def with_arguments(x, kernel):
    """Multiply by a kernel in a function with its own gradient."""
    import tensorflow as tf

    @tf.custom_gradient
    def product(x, kernel):
        def gradient(upstream):
            return upstream @ tf.transpose(kernel), tf.transpose(x) @ upstream

        return x @ kernel, gradient

    return product(x, kernel)


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@pytest.mark.parametrize(
    ("part", "options"),
    [
        *((part, options) for part in PARTS for options in ({}, {"run_eagerly": True})),
        ("vectorized", {"jit_compile": True}),
    ],
    ids=str,
)
def test_weights_read_in_branches_loops_and_maps(part, options):
    found = []
    for optimizer in ("sgd", ESAM("sgd", rho=0.0, beta=1.0, gamma=1.0)):
        keras.utils.set_random_seed(0)
        model = inside(PARTS[part])
        model.compile(optimizer, cross_entropy(), **options)
        for _ in range(2):
            model.train_on_batch(X, Y)
        found.append(weights(model))
    close(*found, rtol=1e-5, atol=1e-6)


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
