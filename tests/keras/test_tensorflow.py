"""What only TensorFlow has: code compiled by `tf.function`, and its own variables."""

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

        def build(self, shape):
            self.dense.build(shape)

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
    with pytest.raises(ESAMRuntimeError, match=r"(?s)inside a `tf\.function`.*helped/dense\w*/"):
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


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_compiled_code_that_reads_no_trained_weight_is_used(run_eagerly):
    import tensorflow as tf

    class Doubled(keras.layers.Layer):
        @tf.function
        def call(self, x):
            return 2.0 * x

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.frozen = with_helper(of_the_layer=True).layers[0]
            self.frozen.trainable = False
            self.doubled = Doubled()
            self.head = keras.layers.Dense(3)

        @tf.function
        def center(self, x):
            return x - tf.reduce_mean(x)

        def call(self, x):
            return self.head(self.doubled(self.frozen(self.center(x))))

    found = []
    for optimizer in ("sgd", ESAM("sgd", rho=0.0, beta=1.0, gamma=1.0)):
        keras.utils.set_random_seed(0)
        model = Model()
        model.compile(optimizer, cross_entropy(), run_eagerly=run_eagerly)
        model.fit(X, Y, batch_size=5, shuffle=False, verbose=0)
        found.append(weights(model))
    close(*found, rtol=1e-6)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_compiled_function_of_a_frozen_layer_reads_the_weights_themselves(run_eagerly):
    """It is traced in a pass, for each new size of the batch, and then used in others."""
    import tensorflow as tf

    class Extracted(keras.Model):
        def __init__(self):
            super().__init__()
            self.frozen = keras.layers.Dense(8, trainable=False)
            self.frozen.build((None, 6))
            self.head = keras.layers.Dense(3)

        def call(self, x):
            return self.head(extract(self.frozen, x))

    extract = tf.function(lambda layer, x: layer(x))
    model = Extracted()
    for _ in range(2):
        model.compile(ESAM("sgd"), cross_entropy(), run_eagerly=run_eagerly)
        model.fit(X, Y, batch_size=5, verbose=0)  # of 5 and 2 samples, with parts of 3 and 1
    model.frozen.set_weights([0.0 * w for w in model.frozen.get_weights()])
    for b in (5, 3, 2, 1):
        same(extract(model.frozen, tf.constant(X[:b])), np.zeros((b, 8)))


def refused_once_used(model, used, match, *, run_eagerly):
    """Check that a step is refused after the model begins to use a function, as `used` tells it."""
    model.compile(ESAM("sgd", beta=1.0), cross_entropy(), run_eagerly=run_eagerly)
    model.train_on_batch(X, Y)
    before = weights(model)
    used.append(True)
    with pytest.raises(ESAMRuntimeError, match=match):
        model.train_on_batch(X[:10], Y[:10])
    same(weights(model), before)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_function_that_reads_what_the_call_has_assigned_is_refused(run_eagerly):
    import tensorflow as tf

    @tf.function
    def compiled(layer, x):
        return x - layer.mean

    class Centered(keras.layers.Layer):
        def build(self, shape):
            self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False)

        def call(self, x):
            if not used:
                return x
            self.mean.assign(ops.mean(x, axis=0))
            return compiled(self, x)

    used = []
    model = keras.Sequential([keras.Input((6,)), Centered(name="centered"), keras.layers.Dense(3)])
    refused_once_used(
        model, used, r"that the call has assigned.*centered/variable", run_eagerly=run_eagerly
    )


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

    @tf.function
    def compiled(dense, x):
        return dense(x)

    used = []
    model = inside(lambda dense, x: compiled(dense, x) if used else dense(x))
    refused_once_used(
        model, used, r"inside a `tf\.function`.*inner/(kernel|bias)", run_eagerly=run_eagerly
    )


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
