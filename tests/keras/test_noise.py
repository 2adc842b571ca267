"""Random numbers that layers draw outside of Keras's seed generators: the same in each pass."""

import contextlib
import random
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import cross_entropy, data

from esam_core import NonFiniteError
from esam_keras import ESAM, Everything, Previous, TopLoss

BACKEND = keras.backend.backend()
X, Y = data()


class Noisy(keras.layers.Layer):
    """Multiplies by a random number, and records it."""

    def __init__(self, draw, **held):
        super().__init__(name="noisy")
        self.draw, self.drawn = draw, []
        for name, value in held.items():
            setattr(self, name, value)

    def call(self, x, training=None):
        if not training:
            return x
        number = self.draw(self)
        self.drawn.append(number)
        return x * ops.cast(number, x.dtype)


def noisy(layer):
    layers = [keras.layers.Dense(8, activation="tanh"), layer, keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


def torch_generator():
    import torch

    return torch.Generator().manual_seed(1)


def torch_number(layer):
    import torch

    return float(torch.rand((), generator=layer.own))


#: A function that returns what the layer holds, and one that draws a number.
HOST = {
    "random": (dict, lambda _: random.random()),
    "numpy": (dict, lambda _: np.random.rand()),  # noqa: NPY002
    "an own random.Random": (
        lambda: {"own": random.Random(1)},
        lambda layer: layer.own.random(),
    ),
    "an own Generator": (
        lambda: {"own": np.random.default_rng(1)},
        lambda layer: layer.own.random(),
    ),
    "an own RandomState in a list": (
        lambda: {"own": [np.random.RandomState(1)]},
        lambda layer: layer.own[0].rand(),
    ),
    "an own torch.Generator": (lambda: {"own": torch_generator()}, torch_number),
}


@pytest.mark.parametrize("settings", [{"gamma": 1.0}, {}, {"select": TopLoss(0.5)}], ids=str)
@pytest.mark.parametrize("kind", HOST)
def test_each_pass_of_an_uncompiled_step_draws_the_same(kind, settings):
    """From step to step the numbers are those of plain training."""
    if "torch" in kind and BACKEND != "torch":
        pytest.skip("of torch only")
    held, draw = HOST[kind]
    found = []
    for optimizer in ("sgd", ESAM("sgd", beta=1.0, **settings)):
        keras.utils.set_random_seed(3)
        layer = Noisy(draw, **held())
        model = noisy(layer)
        model.compile(optimizer, cross_entropy(), run_eagerly=True)
        for _ in range(3):
            model.train_on_batch(X, Y)
        numbers = np.reshape(layer.drawn, (3, -1))
        np.testing.assert_array_equal(numbers, np.repeat(numbers[:, :1], numbers.shape[1], axis=1))
        found.append(numbers[:, 0])
    assert numbers.shape[1] > 1
    np.testing.assert_array_equal(*found)
    assert len(set(found[0])) == 3


@pytest.mark.backends("torch")
def test_checkpointed_layers_draw_the_same():
    with keras.RematScope(mode="full"):
        layer = Noisy(HOST["numpy"][1])
    model = noisy(layer)
    model.compile(ESAM("sgd", beta=1.0), cross_entropy())
    for _ in range(2):
        layer.drawn.clear()
        model.train_on_batch(X, Y)
        assert len(layer.drawn) > 3
        assert len(set(layer.drawn)) == 1


@pytest.mark.parametrize("kind", ["random", "numpy"])
def test_generators_that_no_layer_draws_from_are_left_to_other_threads(kind):
    """They may prepare the next batches meanwhile."""
    _, draw = HOST[kind]
    used = []
    layer = Noisy(lambda layer: draw(layer) if used else 1.0)
    model = noisy(layer)
    model.compile(ESAM("sgd", beta=1.0), cross_entropy(), run_eagerly=True)
    model.train_on_batch(X, Y)
    used.append("as by another thread")
    layer.drawn.clear()
    model.train_on_batch(X, Y)
    assert len(set(layer.drawn)) == len(layer.drawn) == 3


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("kind", ["random", "numpy", "an own Generator"])
def test_a_step_that_is_not_finite_restores_the_generators(kind, mode):
    held, draw = HOST[kind]
    layer = Noisy(draw, **held())
    model = noisy(layer)
    esam = ESAM("sgd", beta=1.0, on_nonfinite=mode)
    model.compile(esam, cross_entropy(), run_eagerly=True)
    model.train_on_batch(X, Y)
    layer.drawn.clear()
    with pytest.raises(NonFiniteError) if mode == "raise" else contextlib.nullcontext():
        model.train_on_batch(np.full_like(X, np.nan), Y)
    assert esam.report.skipped
    assert draw(layer) == layer.drawn[0]


@pytest.mark.backends("torch")
@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_a_step_that_is_not_finite_restores_the_generator_of_torch(mode):
    """From which Dropout without a seed draws."""
    import torch

    model = noisy(keras.layers.Dropout(0.5))
    model.compile(ESAM("sgd", beta=1.0, on_nonfinite=mode), cross_entropy())
    model.train_on_batch(X, Y)
    before = torch.get_rng_state()
    with pytest.raises(NonFiniteError) if mode == "raise" else contextlib.nullcontext():
        model.train_on_batch(np.full_like(X, np.nan), Y)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["random", "numpy", "an own Generator"])
def test_a_failed_step_restores_the_generators(kind):
    held, draw = HOST[kind]

    def fail(layer):
        if len(layer.drawn) > 1:
            draw(layer)
            raise FloatingPointError("now")
        return draw(layer)

    layer = Noisy(fail, **held())
    model = noisy(layer)
    model.compile(ESAM("sgd", beta=1.0), cross_entropy(), run_eagerly=True)
    with pytest.raises(Exception, match="now"):
        model.train_on_batch(X, Y)
    assert draw(layer) == layer.drawn[0]


def uniform(x):
    import tensorflow as tf

    return x * tf.random.uniform(tf.shape(x))


def dropout(x):
    import tensorflow as tf

    return tf.nn.dropout(x, 0.5)


def generator(x):
    import tensorflow as tf

    return x * tf.random.get_global_generator().normal(tf.shape(x))


def inside(x):
    import tensorflow as tf

    return tf.function(uniform)(x)


def binomial(x):
    import tensorflow as tf

    found = tf.random.get_global_generator().binomial(tf.shape(x), 2.0, 0.5)
    return x * tf.cast(found, x.dtype)


def branch(x):
    return ops.cond(ops.sum(x) > -1e9, lambda: uniform(x), lambda: x)


def of_keras(x):
    return x * keras.random.uniform(ops.shape(x), seed=SEEDS)


SEEDS = keras.random.SeedGenerator(1)


def drawing(draw):
    class Draws(keras.layers.Layer):
        def call(self, x):
            return draw(x)

    return noisy(Draws(name="draws"))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize(
    ("draw", "operation"),
    [
        (uniform, "RandomUniform"),
        (dropout, "RandomUniform"),
        (generator, "RngReadAndSkip"),
        (binomial, "StatefulRandomBinomial"),
        (inside, "RandomUniform"),
        (branch, "RandomUniform"),
    ],
)
def test_draws_of_tensorflow_warn_once(draw, operation, run_eagerly):
    model = drawing(draw)
    model.compile(ESAM("sgd", beta=1.0), cross_entropy(), run_eagerly=run_eagerly)
    with pytest.warns(UserWarning, match=rf"by `keras\.random` with .* in {operation}") as found:
        model.fit(X, Y, batch_size=5, verbose=0)
    assert len(found) == 1
    named = "(sequential" in str(found[0].message)
    assert named or run_eagerly or draw is inside
    model.train_on_batch(X, Y)  # warnings are errors


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize(
    ("draw", "settings"),
    [
        (uniform, {"rho": 0.0}),
        (uniform, {"gamma": 1.0, "perturb": Everything(), "ascend": Previous()}),
        (of_keras, {"beta": 1.0}),
    ],
    ids=["base steps", "one pass", "of Keras"],
)
def test_draws_that_do_not_matter_do_not_warn(draw, settings, run_eagerly):
    model = drawing(draw)
    model.compile(ESAM("sgd", **settings), cross_entropy(), run_eagerly=run_eagerly)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model.train_on_batch(X, Y)


@pytest.mark.backends("tensorflow")
def test_draws_warn_at_the_first_step_with_several_passes():
    model = drawing(uniform)
    esam = ESAM("sgd", gamma=0.5, perturb=Everything(), ascend=Previous())
    model.compile(esam, cross_entropy())
    model.train_on_batch(X, Y)  # a base step
    with pytest.warns(UserWarning, match="draws other numbers in each pass"):
        model.train_on_batch(X, Y)
