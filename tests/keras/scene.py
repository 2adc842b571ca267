"""Small models and data, and an oracle: an ESAM step computed from plain Keras steps."""

import keras
import numpy as np
from keras import ops

from esam_core.selectors import subset_size

RHO = 0.3


def data(n=12, features=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, features)).astype("float32")
    return x, rng.integers(0, classes, n)


def mlp(classes=3, features=6, **head):
    return keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(8, activation="tanh", name="first"),
            keras.layers.Dense(5, activation="tanh", name="second"),
            keras.layers.Dense(classes, name="head", **head),
        ]
    )


def cross_entropy(**kwargs):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def weights(model):
    return [np.array(w) for w in model.get_weights()]


def trainable(model):
    return [np.array(ops.convert_to_numpy(v.value)) for v in model.trainable_variables]


def assign(model, values):
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(np.array(value))  # JAX may keep the memory that it is given


def close(found, expected, rtol=2e-5, atol=2e-6):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class Oracle:
    """The results of plain Keras for a compiled loss. It compiles once, and restores the
    weights."""

    def __init__(self, model, settings, batch):
        self.model, self.batch = model, batch
        model.compile(keras.optimizers.SGD(1.0), **settings)

    def gradient(self, theta, batch):
        """Return the gradient, from a step of plain SGD with lr = 1."""
        before = weights(self.model)
        assign(self.model, theta)
        self.model.train_on_batch(*batch)
        found = [a - b for a, b in zip(theta, trainable(self.model), strict=True)]
        self.model.set_weights(before)
        return found

    def single_losses(self, theta):
        """Return the loss of each sample alone."""
        before = weights(self.model)
        assign(self.model, theta)
        found = []
        for i in range(len(first(self.batch[0]))):
            self.model.reset_metrics()  # before Keras 3.11 it does not do so itself
            logs = self.model.test_on_batch(*rows(self.batch, [i]), return_dict=True)
            found.append(float(logs["loss"]))
        self.model.set_weights(before)
        return np.array(found)

    def climbed(self, rho=RHO):
        """Return the variables at theta + epsilon."""
        theta = trainable(self.model)
        g = self.gradient(theta, self.batch)
        length = np.sqrt(sum(np.sum(np.square(a, dtype="float64")) for a in g))
        return [a + rho * b / length for a, b in zip(theta, g, strict=True)]

    def sam(self, lr=0.1):
        """Return the variables after one SAM step: beta = gamma = 1, plain SGD."""
        descent = self.gradient(self.climbed(), self.batch)
        return [a - lr * b for a, b in zip(trainable(self.model), descent, strict=True)]

    def selected(self, gamma=0.5):
        """Return the samples whose losses the perturbation increases most."""
        before = self.single_losses(trainable(self.model))
        after = self.single_losses(self.climbed())
        k = subset_size(gamma, len(before))
        return np.sort(np.argsort(-(after - before), kind="stable")[:k])

    def esam(self, gamma=0.5, lr=0.1, scale=1.0):
        """Return the variables after one step with beta = 1.

        It uses Keras's loss of a subset, which is correct if the mean divides by the number of
        samples. Otherwise `scale` corrects the subset's gradient.
        """
        part = rows(self.batch, self.selected(gamma))
        descent = self.gradient(self.climbed(), part)
        theta = trainable(self.model)
        return [a - lr * scale * b for a, b in zip(theta, descent, strict=True)]


def first(x):
    return keras.tree.flatten(x)[0]


def rows(batch, indices):
    return tuple(keras.tree.map_structure(lambda leaf: leaf[np.array(indices)], b) for b in batch)
