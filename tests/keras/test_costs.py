"""The costs of layers: the same for the same network, however it is written."""

import keras
import numpy as np
import pytest
from keras import layers

from esam_core.cost import expected_cost
from esam_keras import ESAM, All, Only, Previous, Suffix, unit_records
from esam_keras.units import without_costs

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
Y = np.arange(4)
SETTINGS = {"rho": 0.1, "perturb": Suffix(0.5), "gamma": 1.0}


def convolutions():
    return [
        layers.Conv2D(4, 3, padding="same", name="c1"),
        layers.Conv2D(8, 3, strides=2, padding="same", name="c2"),
        layers.Conv2D(16, 3, strides=2, padding="same", name="c3"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(10, name="head"),
    ]


class Parts(keras.Model):
    """Calls its layers one after the other."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Block(layers.Layer):
    """A layer of one's own with layers inside."""

    def __init__(self, inner):
        super().__init__(name="block")
        self.inner = inner

    def call(self, x):
        for part in self.inner:
            x = part(x)
        return x


def known():
    return keras.Sequential([keras.Input((8, 8, 3)), *convolutions()])


def any_size():
    return keras.Sequential([keras.Input((None, None, 3)), *convolutions()])


def subclassed():
    return Parts(convolutions())


def with_a_block():
    first, second, third, *rest = convolutions()
    return keras.Sequential([keras.Input((8, 8, 3)), first, Block([second, third]), *rest])


WAYS = [known, any_size, subclassed, with_a_block]


def costs(units):
    return [unit.cost for unit in units]


def compiled(model, **settings):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(ESAM("sgd", **{**SETTINGS, **settings}), loss)
    return model


EXPECTED = costs(unit_records(known()))


@pytest.mark.parametrize("make", WAYS)
def test_the_same_network_has_the_same_costs(make):
    assert costs(unit_records(make(), X)) == EXPECTED
    assert EXPECTED[::2] == [64 * 27 * 4, 16 * 36 * 8, 4 * 72 * 16, 160]


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("make", WAYS[:3])
def test_the_same_weights_are_perturbed(make, how, run_eagerly):
    model = compiled(make())
    model.run_eagerly = run_eagerly
    getattr(model, how)(X, Y)
    perturbed = [name.split("/")[-2] for name in model.optimizer.report.perturbed]
    assert perturbed == ["c3", "c3", "head", "head"]
    units = unit_records(model)  # warnings are errors
    assert costs(units) == EXPECTED
    ratios = [expected_cost(Suffix(0.5), u, All()).ratio for u in (units, unit_records(known()))]
    assert ratios[0] == ratios[1]


@pytest.mark.parametrize("make", WAYS[1:])
def test_unknown_shapes_are_named(make):
    model = make()
    if make is subclassed:
        model(X)
    with pytest.warns(UserWarning, match=r"c2/kernel.* are guesses.*unit_records\(model, x\)"):
        unit_records(model)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_layer_that_no_call_runs_is_named():
    class Auxiliary(Parts):
        def build(self, shape):
            self.aside = layers.Dense(2, name="aside")
            self.aside.build((None, 3))

    model = compiled(Auxiliary(convolutions()))
    with pytest.warns(
        UserWarning, match=r"Suffix\(start=0\.5\).*aside/kernel are guesses"
    ) as found:
        model.train_on_batch(X, Y)
    assert not any("c2" in str(w.message) for w in found)
    model = compiled(Auxiliary(convolutions()), perturb=Suffix("head"))
    model.train_on_batch(X, Y)  # other warnings are errors


@pytest.mark.parametrize("inner", [0, 1], ids=["RNN", "attention"])
def test_layers_inside_keras_layers(inner):
    def network():
        return [
            layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="rnn"),
            layers.TimeDistributed(layers.Dense(4), name="each"),
        ]

    class Attention(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention = layers.MultiHeadAttention(2, 3, name="attention")

        def call(self, x):
            return self.attention(x, x)

    x = np.zeros((2, 5, 6), "float32")
    inputs = keras.Input((5, 6))
    if inner:
        attention = layers.MultiHeadAttention(2, 3, name="attention")
        models = [keras.Model(inputs, attention(inputs, inputs)), Attention()]
    else:
        models = [keras.Sequential([inputs, *network()]), Parts(network())]
    found = [costs(unit_records(model, x)) for model in models]
    assert found[0] == found[1]
    assert not without_costs(models[0], models[0].trainable_variables, recorded=False)


@pytest.mark.backends("tensorflow", "torch")
def test_a_model_that_only_runs_eagerly():
    class Reads(Parts):
        def call(self, x):
            scale = float(np.asarray(keras.ops.convert_to_numpy(x)).shape[-1])
            return super().call(x / scale)

    model = compiled(Reads(convolutions()))
    model.run_eagerly = True
    model.train_on_batch(X, Y)
    assert costs(unit_records(model)) == EXPECTED


@pytest.mark.parametrize("perturb", [Suffix(0.5), Only("bias", Suffix("c3"))])
def test_previous_keeps_enough_and_can_be_saved(perturb, tmp_path):
    settings = {"perturb": perturb, "ascend": Previous()}
    model = compiled(subclassed(), **settings)
    for _ in range(2):
        model.fit(X, Y, verbose=0)
    names = model.optimizer.report.perturbed
    assert len(names) == (4 if perturb == Suffix(0.5) else 2)
    model.save_weights(tmp_path / "x.weights.h5")
    other = subclassed()
    other(X)
    compiled(other, **settings)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "x.weights.h5")
    other.fit(X, Y, verbose=0)
    assert len(other.optimizer.report.perturbed) == len(names)
