"""Weights that a call assigns: their gradient is that of plain Keras."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import close, data, same, trainable, weights

from esam_core import ESAMRuntimeError
from esam_keras import ESAM

BACKEND = keras.backend.backend()
X, _ = data(16)
TARGETS = X[:, :1].copy()


def esam(**settings):
    return ESAM(keras.optimizers.SGD(0.1), **{"rho": 0.0, "beta": 1.0, "gamma": 1.0, **settings})


class Centered(keras.layers.Layer):
    """Subtracts a running mean, which it updates first."""

    def __init__(self, tracked):
        super().__init__()
        self.tracked = tracked

    def build(self, shape):
        mean = keras.Variable(np.zeros(shape[-1], "float32"), trainable=False, name="mean")
        if self.tracked:
            self.mean = mean
        else:
            object.__setattr__(self, "mean", mean)

    def call(self, x, training=False):
        if training:
            self.mean.assign(0.5 * self.mean + 0.5 * ops.mean(x, axis=0))
        return x - self.mean


class Consistent(keras.Model):
    """Calls its layers in training mode, then again in inference mode for a term of the loss."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(momentum=0.5),
                keras.layers.Activation("relu"),
                keras.layers.Dense(1),
            ]
        )

    def build(self, _):
        self.built = True

    def call(self, x, training=False):
        return self.body(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + ops.mean(ops.square(self(x, training=False) - y_pred)) if training else loss


def centered(tracked):
    layers = [keras.layers.Dense(5), Centered(tracked), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((6,)), *layers])


@pytest.mark.backends("tensorflow", "torch")  # on JAX, plain Keras lets the gradient through
@pytest.mark.parametrize(
    "make",
    [Consistent, lambda: centered(True), lambda: centered(False)],
    ids=["norm", "own", "stranger"],
)
def test_no_gradient_flows_through_an_assigned_value(make):
    found = []
    for optimizer in (keras.optimizers.SGD(0.1), esam()):
        keras.utils.set_random_seed(0)
        model = make()
        model.compile(optimizer, "mse")
        for _ in range(2):
            model.train_on_batch(X, TARGETS)
        found.append(weights(model))
    close(*found, rtol=1e-5, atol=1e-6)


class Counting(keras.layers.Layer):
    """Counts its calls in training mode, in the tensor of a weight or by `assign`."""

    def __init__(self, in_place):
        super().__init__(name="counting")
        self.in_place = in_place

    def build(self, _):
        self.n = self.add_weight(initializer="zeros", trainable=False, name="n")

    def call(self, x, training=False):
        if training and self.in_place:
            import torch

            with torch.no_grad():
                self.n.value.add_(1)
        elif training:
            self.n.assign(self.n + 1)
        return x * (1 + self.n)


def counting(in_place):
    return keras.Sequential([keras.Input((6,)), Counting(in_place), keras.layers.Dense(1)])


@pytest.mark.backends("torch")
@pytest.mark.parametrize("settings", [{}, {"rho": 0.3, "gamma": 0.5}], ids=str)
def test_a_write_in_place_is_refused(settings):
    import torch

    model = counting(in_place=True)
    model.compile(esam(**settings), "mse")
    before, state = trainable(model), torch.get_rng_state()
    with pytest.raises(ESAMRuntimeError, match=r"Use `assign`.*value of \S*counting/n"):
        model.train_on_batch(X, TARGETS)
    same(trainable(model), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("settings", [{}, {"rho": 0.3, "gamma": 0.5}], ids=str)
def test_an_assigned_counter_counts_steps(settings):
    model = counting(in_place=False)
    model.compile(esam(**settings), "mse")
    for _ in range(3):
        model.train_on_batch(X, TARGETS)
    assert float(model.layers[0].n.numpy()) == 3.0


class Count(keras.layers.Layer):
    def build(self, _):
        self.n = self.add_weight(initializer="zeros", trainable=False, name="n")

    def call(self, x):
        self.n.assign(self.n + 1.0)
        return x * 1.0


def branch(layer, x, training):
    return ops.cond(ops.mean(x) > -100.0, lambda: layer(x, training=training), lambda: x * 1.0)


def loop(layer, x, training):
    return ops.fori_loop(0, 2, lambda _, c: layer(c, training=training), x)


class Inside(keras.layers.Layer):
    """Calls a layer in a branch or a loop."""

    def __init__(self, layer, part):
        super().__init__()
        self.layer, self.part = layer, part

    def build(self, shape):
        if not self.layer.built:
            self.layer.build(shape)

    def call(self, x, training=False):
        return self.part(self.layer, x, training)


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize("part", [branch, loop])
@pytest.mark.parametrize("name", ["count/n", "seed_generator"])
def test_assignments_in_branches_and_loops(name, part, run_eagerly):
    """As in plain Keras, or refused where TensorFlow compiles the step."""

    def build():
        keras.utils.set_random_seed(0)
        counts = name == "count/n"
        layer = Count(name="count") if counts else keras.layers.Dropout(0.5, seed=1, name="dropout")
        layers = [keras.layers.Dense(5), Inside(layer, part), keras.layers.Dense(1)]
        return keras.Sequential([keras.Input((6,)), *layers])

    def state(model):
        return [np.array(ops.convert_to_numpy(v.value)) for v in model.variables]

    plain, model = build(), build()
    plain.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=run_eagerly)
    model.compile(esam(), "mse", run_eagerly=run_eagerly)
    before = state(model)
    plain.train_on_batch(X, TARGETS)
    if BACKEND == "torch" or run_eagerly:
        model.train_on_batch(X, TARGETS)
        close(state(model)[: len(before)], state(plain)[: len(before)], rtol=1e-5, atol=1e-6)
    else:
        with pytest.raises(ESAMRuntimeError, match=f"run_eagerly=True.*{name}"):
            model.train_on_batch(X, TARGETS)
        same(state(model)[: len(before)], before)
