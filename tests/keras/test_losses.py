"""Every kind of compiled loss: losses per sample, selection, both gradients; or a clear error."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import (
    RHO,
    Oracle,
    close,
    cross_entropy,
    data,
    mlp,
    rows,
    same,
    trainable,
    weights,
)
from tests.keras.stepping import ONE_HOT, OwnComputeLoss, X, Y, check, esam, step

from esam_core import ESAMValueError
from esam_keras import ESAM, Everything, Proportional, Random, TopLoss


def own_function(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1) ** 2


class OwnObject(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.logsumexp(y_pred - y_true, axis=-1)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("mse", ONE_HOT),
        ("huber", ONE_HOT),
        (own_function, ONE_HOT),
        (OwnObject(), ONE_HOT),
        (cross_entropy(), Y),
        (cross_entropy(reduction="mean"), Y),
        (cross_entropy(reduction="mean_with_sample_weight"), Y),
        (keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), ONE_HOT),
    ],
    ids=["string", "huber", "function", "object", "loss", "mean", "weighted mean", "smooth"],
)
def test_kinds(loss, y):
    check(mlp(), {"loss": loss}, (X, y))


def test_probabilities():
    check(mlp(activation="softmax"), {"loss": "sparse_categorical_crossentropy"}, (X, Y))


def test_a_sum_is_b_times_a_mean():
    n = len(X)
    check(mlp(), {"loss": cross_entropy(reduction="sum")}, (X, Y), n / (n // 2), losses_scale=n)


def test_sample_weights():
    w = np.linspace(0.1, 2.0, len(X), dtype="float32")
    check(mlp(), {"loss": cross_entropy()}, (X, Y, w))


def test_sample_weights_of_zero_are_never_preferred():
    w = np.ones(len(X), "float32")
    w[:3] = 0.0
    report = step(mlp(), {"loss": cross_entropy()}, (X, Y, w), gamma=0.25)
    assert not set(ops.convert_to_numpy(report.losses)[:3]) - {0.0}


def test_class_weights():
    model = mlp()
    before = weights(model)
    by_class = {0: 0.2, 1: 1.0, 2: 3.0}
    model.compile(esam(), loss=cross_entropy())
    model.train_on_batch(X, Y, class_weight=by_class)
    found = trainable(model)
    model.set_weights(before)
    w = np.array([by_class[c] for c in Y], "float32")
    step(model, {"loss": cross_entropy()}, (X, Y, w))
    same(found, trainable(model))
    model.set_weights(before)
    model.compile(esam(), loss=cross_entropy())
    model.fit(X, Y, batch_size=len(X), shuffle=False, class_weight=by_class, verbose=0)
    close(found, trainable(model))


def two_headed():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(
        inputs,
        {
            "label": keras.layers.Dense(3, name="label")(hidden),
            "value": keras.layers.Dense(2, name="value")(hidden),
        },
    )


def test_several_outputs_with_loss_weights():
    targets = {"label": Y, "value": ONE_HOT[:, :2]}
    settings = {
        "loss": {"label": cross_entropy(), "value": "mse"},
        "loss_weights": {"label": 0.7, "value": 2.5},
    }
    check(two_headed(), settings, (X, targets))


def test_several_outputs_with_their_own_weights():
    w = np.linspace(0.5, 1.5, len(X), dtype="float32")
    targets = {"label": Y, "value": ONE_HOT[:, :2]}
    settings = {"loss": {"label": cross_entropy(), "value": "mse"}}
    check(two_headed(), settings, (X, targets, {"label": w, "value": w[::-1].copy()}))


def test_a_list_of_outputs_and_one_without_loss():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(3, name=n)(hidden) for n in "ab"])
    check(model, {"loss": [cross_entropy(), "mse"]}, (X, [Y, ONE_HOT]))


def sequence_model():
    return keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            keras.layers.Embedding(10, 4, mask_zero=True),
            keras.layers.SimpleRNN(5, return_sequences=True),
            keras.layers.Dense(3),
        ]
    )


def sequences():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 10, (8, 7)).astype("int32")
    for row, length in enumerate(rng.integers(2, 7, 8)):
        tokens[row, length:] = 0
    return tokens, rng.integers(0, 3, (8, 7))


def test_sequences_without_a_mask():
    tokens, labels = sequences()
    tokens = np.maximum(tokens, 1)
    check(sequence_model(), {"loss": cross_entropy()}, (tokens, labels))


def test_sequences_with_weights_by_position():
    tokens, labels = sequences()
    w = np.random.default_rng(2).uniform(0.1, 1.0, labels.shape).astype("float32")
    check(sequence_model(), {"loss": cross_entropy()}, (np.maximum(tokens, 1), labels, w))


def test_masked_sequences():
    # The mean divides by the unmasked places of the whole batch; l_i is sample i's part of it.
    tokens, labels = sequences()
    places = (tokens != 0).sum(axis=1)
    model = sequence_model()
    before = weights(model)
    oracle = Oracle(model, {"loss": cross_entropy()}, (tokens, labels))
    singles, climbed = oracle.single_losses(trainable(model)), oracle.climbed()
    report = step(model, {"loss": cross_entropy()}, (tokens, labels))
    expected = singles * places * len(tokens) / places.sum()
    np.testing.assert_allclose(ops.convert_to_numpy(report.losses), expected, rtol=1e-5)
    order = np.argsort(-ops.convert_to_numpy(report.increases), kind="stable")
    chosen = np.sort(order[:4])
    np.testing.assert_array_equal(ops.convert_to_numpy(report.indices), chosen)
    found = trainable(model)
    model.set_weights(before)
    # Keras divides a subset's loss by the subset's places.
    oracle = Oracle(model, {"loss": cross_entropy()}, (tokens, labels))
    part = oracle.gradient(climbed, rows((tokens, labels), chosen))
    factor = places[chosen].sum() / places.sum() * len(tokens) / len(chosen)
    theta = trainable(model)
    close(found, [a - 0.1 * factor * b for a, b in zip(theta, part, strict=True)])


def test_ragged_ends():
    x, y = data(11)
    model = mlp()
    model.compile(esam(), loss=cross_entropy())
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            report = self.model.optimizer.report
            seen.append((len(report.losses), report.indices))

    model.fit(x, y, batch_size=4, epochs=2, verbose=0, shuffle=False, callbacks=[Watch()])
    sizes = [(b, None if i is None else len(i)) for b, i in seen]
    assert sizes == [(4, 2), (4, 2), (3, 2)] * 2


def test_a_last_batch_of_one():
    x, y = data(9)
    model = mlp()
    model.compile(esam(), loss=cross_entropy())
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0, shuffle=False).history
    assert np.isfinite(history["loss"]).all()
    assert len(model.optimizer.report.losses) == 1


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_regularisation_counts_in_both_gradients(gamma):
    def build():
        return keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(
                    8, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.3)
                ),
                keras.layers.Dense(3, bias_regularizer=keras.regularizers.L1(0.2)),
            ]
        )

    model = build()
    before = weights(model)
    settings = {"loss": cross_entropy()}
    oracle = Oracle(model, settings, (X, Y))
    expected = oracle.sam() if gamma == 1.0 else oracle.esam()
    report = step(model, settings, (X, Y), gamma=gamma)
    close(trainable(model), expected)
    # No sample's loss contains it.
    plain = mlp()
    plain.compile("sgd", loss=cross_entropy(reduction=None))
    model.set_weights(before)
    values = cross_entropy(reduction=None)(Y, model(X))
    np.testing.assert_allclose(
        ops.convert_to_numpy(report.losses), ops.convert_to_numpy(values), rtol=1e-5
    )


class AddsLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(0.5 * ops.mean(ops.square(x)))
        return x


def test_add_loss_counts_in_both_gradients():
    inputs = keras.Input((6,))
    hidden = AddsLoss()(keras.layers.Dense(8, activation="tanh")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    settings = {"loss": cross_entropy()}
    expected = Oracle(model, settings, (X, Y)).sam()
    step(model, settings, (X, Y), gamma=1.0)
    close(trainable(model), expected)


def test_add_loss_alone_is_enough_for_sam():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, AddsLoss()(keras.layers.Dense(8)(inputs)))
    expected = Oracle(model, {}, (X,)).sam()
    step(model, {}, (X,), gamma=1.0)
    close(trainable(model), expected)


def test_a_custom_compute_loss():
    model = OwnComputeLoss()
    model(X)
    settings = {}
    before = weights(model)
    expected = Oracle(model, settings, (X, ONE_HOT)).sam()
    step(model, settings, (X, ONE_HOT), gamma=1.0)
    close(trainable(model), expected)
    model.set_weights(before)
    report = step(model, settings, (X, ONE_HOT))
    model.set_weights(before)
    values = ops.mean(ops.square(ops.subtract(ONE_HOT, model(X))), axis=-1)
    np.testing.assert_allclose(
        ops.convert_to_numpy(report.losses), ops.convert_to_numpy(values), rtol=1e-5, atol=1e-7
    )
    order = np.argsort(-ops.convert_to_numpy(report.increases), kind="stable")
    np.testing.assert_array_equal(ops.convert_to_numpy(report.indices), np.sort(order[:6]))


def test_compute_loss_that_adds_to_keras_own():
    class Adds(OwnComputeLoss):
        def compute_loss(self, *args, **kwargs):
            return keras.Model.compute_loss(self, *args, **kwargs) + 0.1 * ops.mean(
                ops.square(self.head.kernel)
            )

    model = Adds()
    model(X)
    expected = Oracle(model, {"loss": "mse"}, (X, ONE_HOT)).sam()
    step(model, {"loss": "mse"}, (X, ONE_HOT), gamma=1.0)
    close(trainable(model), expected)
    assert step(model, {"loss": "mse"}, (X, ONE_HOT)).indices is not None


@pytest.mark.parametrize("selector", [TopLoss(0.5), Random(0.5), Proportional(0.5)])
def test_selectors_work_with_compiled_losses(selector):
    model = mlp()
    settings = {"loss": cross_entropy()}
    model.compile(
        ESAM(keras.optimizers.SGD(0.1), rho=RHO, perturb=Everything(), select=selector), **settings
    )
    model.train_on_batch(X, Y)
    report = model.optimizer.report
    assert len(report.indices) == 6
    assert report.perturbed_losses is None


@dataclasses.dataclass
class Scaled:
    """A loss of the user's own, which is not hashable."""

    factor: float

    def __call__(self, y, outputs):
        return self.factor * keras.ops.mean(keras.ops.square(outputs - y), axis=-1)


def test_a_loss_that_is_not_hashable():
    model = mlp()
    model.compile(ESAM("sgd", beta=1.0), Scaled(2.0))
    model.train_on_batch(data()[0], np.ones((12, 3)))
    assert len(model.optimizer.report.losses) == 12


def test_a_loss_in_which_samples_depend_on_each_other_without_subsets():
    """With rho=0 all steps are base steps, on whole batches."""

    def spread(y, outputs):
        centre = keras.ops.mean(outputs, axis=0, keepdims=True)
        return keras.ops.sum(keras.ops.square(outputs - centre), axis=-1) + 0.0 * y[:, 0]

    x, y = data()[0], np.ones((12, 3))
    model = mlp()
    model.compile(ESAM("sgd", rho=0.0), spread)
    model.train_on_batch(x, y)
    model.compile(ESAM("sgd", rho=0.1), spread)
    with pytest.raises(ESAMValueError, match="depend"):
        model.train_on_batch(x, y)
