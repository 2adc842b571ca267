"""The untouched prefix is run once, and the step is the one that runs everything again."""

from collections import Counter
from typing import ClassVar

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common.global_state import set_global_attribute
from tests.keras.scene import cross_entropy, data, weights

import esam_keras.training
from esam_keras import ESAM, Everything, Only

BACKEND = keras.backend.backend()
X, Y = data()
LAYERS = keras.layers


def dense(n, name, **kwargs):
    return LAYERS.Dense(n, activation="tanh", name=name, **kwargs)


class Counted(keras.layers.Layer):
    """A layer that counts its calls by name."""

    seen: ClassVar = Counter()

    def call(self, x):
        Counted.seen[self.name] += 1
        return x * 1.0


class Draws(keras.layers.Layer):
    """Noise from Keras's global generator."""

    def call(self, x):
        return x + 0.1 * keras.random.normal(ops.shape(x))


class Sharing(Counted):
    """Noise from a generator that is given."""

    def __init__(self, name, generator):
        super().__init__(name=name)
        self.generator = generator

    def call(self, x):
        return super().call(x) + 0.1 * keras.random.normal(ops.shape(x), seed=self.generator)


class Adds(keras.layers.Layer):
    """A loss of its own activations."""

    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(x)))
        return x


def chain(*between):
    return keras.Sequential(
        [keras.Input((6,)), dense(8, "first"), *between, dense(7, "second"), LAYERS.Dense(3)]
    )


def noise(seed):
    return LAYERS.Dropout(0.4, seed=seed)


def branches():
    """The prefix is read at several places, and a branch of it runs after perturbed layers."""
    x = keras.Input((6,))
    first = dense(8, "first")(x)
    late = dense(8, "aside")(first)
    for i in range(3):
        late = dense(8, f"aside{i}")(late)
    middle = dense(8, "second")(LAYERS.Dropout(0.3)(first))
    middle = LAYERS.concatenate([LAYERS.add([first, middle]), late])
    return keras.Model(x, LAYERS.Dense(3)(LAYERS.Dropout(0.3)(middle)))


def nested():
    """The cut is inside a nested model; another is whole in the prefix."""
    whole = keras.Sequential([keras.Input((6,)), dense(6, "whole"), noise(1)])
    cut = keras.Sequential(
        [keras.Input((6,)), dense(8, "first"), LAYERS.BatchNormalization(), dense(7, "second")]
    )
    return keras.Sequential([keras.Input((6,)), whole, cut, noise(None), LAYERS.Dense(3)])


def shared():
    """A layer that is called in the prefix and after it."""
    again = dense(6, "again")
    x = keras.Input((6,))
    return keras.Model(x, LAYERS.Dense(3)(again(dense(6, "second")(again(x)))))


def shared_generator():
    """Two layers draw from one generator, one of them in the prefix."""
    generator = keras.random.SeedGenerator(5)
    early, late = Sharing("early", generator), Sharing("late", generator)
    return keras.Sequential([*chain(early).layers, late, LAYERS.Dense(3)])


def masked():
    """The mask that the loss sees comes out of the prefix."""
    x = keras.Input((5,), dtype="int32")
    hidden = LAYERS.Embedding(9, 6, mask_zero=True, name="first")(x)
    return keras.Model(x, LAYERS.Dense(3)(dense(6, "second")(hidden)))


def two_outputs():
    """One output comes out of the prefix."""
    x = keras.Input((6,))
    hidden = dense(8, "first")(x)
    side = LAYERS.Dense(3, name="side")(hidden)
    return keras.Model(x, [side, LAYERS.Dense(3)(dense(7, "second")(hidden))])


MODELS = {
    "chain": chain,
    "seeded noise": lambda: chain(noise(3)),
    "noise": lambda: keras.Sequential([*chain(noise(None)).layers, noise(None), LAYERS.Dense(3)]),
    "batch norm": lambda: chain(LAYERS.BatchNormalization()),
    "regularised": lambda: keras.Sequential(
        [
            keras.Input((6,)),
            dense(8, "first", kernel_regularizer="l2", activity_regularizer="l2"),
            Adds(),
            dense(7, "second"),
            LAYERS.Dense(3),
        ]
    ),
    "branches": branches,
    "nested": nested,
    "shared": shared,
    "one generator": shared_generator,
    "masked": masked,
    "two outputs": two_outputs,
}
if BACKEND != "jax":  # where Keras refuses its global generator in a traced function
    MODELS["global generator"] = lambda: keras.Sequential(
        [*chain(Draws()).layers, Draws(), LAYERS.Dense(3)]
    )


def trained(build, literally, monkeypatch, eager=False, **settings):
    """A step; `literally` runs every pass in full."""
    keras.utils.set_random_seed(4)
    set_global_attribute("global_seed_generator", None)  # Keras 3.10 lets the old one go on
    keras.random.normal((1,))  # makes a new one
    model = build()
    x = np.random.default_rng(0).integers(0, 9, (12, 5)) if build is masked else X
    y = Y[:8]
    if build in (masked, two_outputs):
        y = np.repeat(y[:, None], 5, axis=1) if build is masked else [y, y]
    esam = ESAM(
        keras.optimizers.SGD(0.2),
        **{"rho": 0.5, "perturb": Only("*second*", Everything()), **settings},
    )
    with monkeypatch.context() as patch:
        if literally:
            patch.setattr(esam_keras.training, "find_graph", lambda model: None)
        model.compile(esam, cross_entropy(), run_eagerly=eager)
        model.train_on_batch(x[:8], y)
    report = esam.report
    after = [] if report.perturbed_losses is None else [report.perturbed_losses]
    arrays = [ops.convert_to_numpy(a) for a in (report.losses, *after)]
    return model, weights(model) + arrays


# What is common to the backends is shown on the quickest; gamma = 1 goes through a graph there.
CASES = (
    [(name, gamma) for name in MODELS for gamma in (0.5, 1.0)]
    if BACKEND == "torch"
    else [
        (name, 0.5)
        for name in ("noise", "regularised", "nested", "masked", "global generator")
        if name in MODELS
    ]
)


@pytest.mark.parametrize(("name", "gamma"), CASES)
def test_the_step_is_that_which_runs_everything_again(name, gamma, monkeypatch):
    model, found = trained(MODELS[name], False, monkeypatch, gamma=gamma)
    _, expected = trained(MODELS[name], True, monkeypatch, gamma=gamma)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not any("_run_through_graph" in vars(layer) for layer in model._flatten_layers())


def counts(build, monkeypatch, **settings):
    """How often each counted layer is called in a step, or while one is traced."""
    model, _ = trained(build, False, monkeypatch, **settings)
    Counted.seen.clear()
    model.train_on_batch(X, Y)  # of another size: traced again
    return Counted.seen


def counting():
    inner = keras.Sequential(
        [keras.Input((6,)), Counted(name="nested_early"), dense(7, "second"), Counted(name="late")]
    )
    return keras.Sequential([keras.Input((6,)), dense(6, "first"), Counted(name="early"), inner])


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize(
    ("settings", "early", "late"),
    [
        ({"gamma": 0.5}, 2, 3),  # ascent and descent; the selection pass as well
        ({"gamma": 1.0}, 1 if BACKEND == "torch" else 2, 2),
        ({"gamma": 1.0, "norm": "full"}, 2, 2),
        ({"gamma": 0.5, "norm": "full"}, 2, 3),
        ({"gamma": 0.5, "perturb": Everything()}, 3, 3),
        ({"rho": 0.0}, 1, 1),
    ],
    ids=["some", "all", "all, full norm", "some, full norm", "everything", "nothing"],
)
def test_the_prefix_is_run_once_less(settings, early, late, monkeypatch):
    seen = counts(counting, monkeypatch, **settings)
    assert seen == {"early": early, "nested_early": early, "late": late}


def test_a_layer_that_shares_its_state_is_run_again(monkeypatch):
    assert counts(shared_generator, monkeypatch)["early"] == 3


def test_models_of_another_kind_are_run_in_full(monkeypatch):
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.early = dense(8, "first"), Counted(name="early")
            self.second = dense(3, "second")

        def call(self, x):
            return self.second(self.early(self.first(x)))

    assert counts(Mine, monkeypatch)["early"] == 3


def test_a_functional_model_with_a_call_of_its_own_is_run_in_full(monkeypatch):
    class Mine(keras.Model):
        def call(self, x, training=None):
            return super().call(2.0 * x, training=training)

    def build():
        x = keras.Input((6,))
        return Mine(x, dense(3, "second")(Counted(name="early")(x)))

    assert counts(build, monkeypatch)["early"] == 3


@pytest.mark.backends("tensorflow", "torch")
def test_a_pass_that_raises_leaves_the_model_as_it_was():
    class Stops(keras.layers.Layer):
        def call(self, x):
            if stopping:
                raise KeyboardInterrupt
            return x

    stopping = False
    model = chain(Stops())
    model.compile(ESAM("sgd", perturb=Only("*second*", Everything())), run_eagerly=True, loss="mse")
    model.train_on_batch(X, np.zeros((12, 3)))
    stopping = True
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        model.train_on_batch(X, np.zeros((12, 3)))
    for a, b in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "_run_through_graph" not in vars(model._functional)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_scaled_loss_in_mixed_precision(gamma, monkeypatch):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        found = trained(chain, False, monkeypatch, gamma=gamma)[1]
        expected = trained(chain, True, monkeypatch, gamma=gamma)[1]
    finally:
        keras.config.set_dtype_policy("float32")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_frozen_beginning_is_run_once_less(monkeypatch):
    def build():
        model = counting()
        model.layers[0].trainable = False
        return model

    assert counts(build, monkeypatch, perturb=Everything())["early"] == 2
