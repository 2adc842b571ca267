"""Losses that need other samples' predictions, or what `call` stored: refused, or used by SAM."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import Oracle, close, mlp, trainable
from tests.keras.stepping import ONE_HOT, OwnComputeLoss, X, Y, check, esam, refusal, step

from esam_core import ESAMValueError
from esam_keras import ESAM, Everything, Part, Previous, Random
from esam_keras.trial import Trial


class WeightedMean(OwnComputeLoss):
    def total(self, values, sample_weight):
        weight = 1.0 if sample_weight is None else ops.cast(sample_weight, values.dtype)
        return ops.sum(values) / ops.sum(ops.broadcast_to(weight, values.shape))


def test_a_mean_over_the_weights_is_refused():
    model = WeightedMean()  # without any weight it is 0 / 0
    model(X)
    refusal(model, {}, (X, ONE_HOT), "is not linear in `sample_weight`")


class Reconstructs(OwnComputeLoss):
    """Adds a term in the predictions: weighted, or not."""

    weighted = False

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        own = keras.Model.compute_loss(self, x, y, y_pred, sample_weight)
        errors = ops.mean(ops.square(ops.subtract(y_pred, x[:, :3])), axis=-1)
        if self.weighted and sample_weight is not None:
            errors = errors * sample_weight
        return 1e-3 * own + ops.mean(errors)


SUBSETS = [{"gamma": 0.5}, {"select": Random(0.5)}, {"gamma": 1.0, "ascend": Part(0.25)}]


@pytest.mark.parametrize("settings", SUBSETS, ids=str)
def test_an_unweighted_term_in_the_predictions_is_refused(settings):
    model = Reconstructs()
    model(X)
    refusal(
        model, {"loss": "mse"}, (X, ONE_HOT), "a term in the predictions that is not", **settings
    )


def test_an_unweighted_term_in_the_predictions_counts_in_sam():
    model = Reconstructs()
    model(X)
    expected = Oracle(model, {"loss": "mse"}, (X, ONE_HOT)).sam()
    step(model, {"loss": "mse"}, (X, ONE_HOT), gamma=1.0)
    close(trainable(model), expected)


def test_a_weighted_term_in_the_predictions():
    model = Reconstructs()
    model.weighted = True
    model(X)
    check(model, {"loss": "mse"}, (X, ONE_HOT))


class Contrasts(OwnComputeLoss):
    """A weighted mean of distances from the batch's mean prediction."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        weight = 1.0 if sample_weight is None else sample_weight
        distance = ops.mean(ops.square(y_pred - ops.mean(y_pred, axis=0)), axis=-1)
        return ops.mean(distance * weight)


def test_a_compute_loss_that_compares_samples_is_refused():
    model = Contrasts()
    model(X)
    refusal(model, {}, (X, ONE_HOT), "whose `sample_weight` is 0")


def contrast(y_true, y_pred):
    """Compare each sample with the one before it."""
    return ops.mean(ops.square(y_true - y_pred + ops.roll(y_pred, 1, axis=0)), axis=-1)


def test_keras_own_losses_are_not_tested(monkeypatch):
    """The artificial predictions of a model with many outputs take time and memory."""
    evaluated = []
    total = Trial.total
    monkeypatch.setattr(Trial, "total", lambda *a: evaluated.append(a) or total(*a))
    for loss in ("mse", keras.losses.CategoricalCrossentropy(), "binary_crossentropy"):
        step(mlp(activation="sigmoid"), {"loss": loss}, (X, ONE_HOT), gamma=0.5)
    assert not evaluated
    step(mlp(), {"loss": contrast}, (X, ONE_HOT), gamma=1.0)
    assert evaluated


@pytest.mark.parametrize("settings", SUBSETS, ids=str)
@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (keras.losses.Circle(gamma=4.0), Y),
        (keras.losses.Dice(axis=0), np.eye(12, dtype="float32")),  # 12 values, of 12 samples
        (contrast, ONE_HOT),
    ],
    ids=["circle", "dice", "function"],
)
def test_losses_that_depend_on_other_samples(loss, y, settings):
    model = mlp(classes=12 if y.shape == (12, 12) else 3, activation="sigmoid")
    refusal(
        model, {"loss": loss}, (X, y), "must not depend on the predictions", rows=12, **settings
    )
    expected = Oracle(model, {"loss": loss}, (X, y)).sam()
    report = step(model, {"loss": loss}, (X, y), gamma=1.0)
    close(trainable(model), expected)
    assert report.losses is None


def test_a_first_batch_of_one_sample_shows_no_dependence():
    """The loss is tested again on a batch of several samples."""
    model = mlp(activation="sigmoid")
    model.compile(esam(), keras.losses.Circle())
    model.train_on_batch(X[:1], Y[:1])
    with pytest.raises(ESAMValueError, match="must not depend on the predictions"):
        model.train_on_batch(X, Y)


class Encodes(OwnComputeLoss):
    """Its loss reads what `call` stored, as that of a variational autoencoder does."""

    def call(self, x):
        self.code = self.first(x)
        return self.head(self.code)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        own = keras.Model.compute_loss(self, x, y, y_pred, sample_weight)
        return own + 0.1 * ops.mean(ops.square(self.code))


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_loss_that_reads_what_call_stored_works_in_sam(rho):
    settings = {"loss": "mse"}
    keras.utils.set_random_seed(0)
    plain = Encodes()
    plain(X)
    oracle = Oracle(plain, settings, (X, ONE_HOT))
    climbed = oracle.climbed(rho)
    gradient = oracle.gradient(climbed, (X, ONE_HOT))
    expected = [a - 0.1 * g for a, g in zip(trainable(plain), gradient, strict=True)]
    keras.utils.set_random_seed(0)
    model = Encodes()  # which has no code yet
    model.compile(esam(1.0, rho=rho), **settings)
    model.fit(X, ONE_HOT, batch_size=12, verbose=0)
    close(trainable(model), expected)


def test_a_loss_that_reads_what_call_stored_is_refused_for_some_samples():
    model = Encodes()
    model.compile(esam(), "mse")
    with pytest.raises(ESAMValueError, match="not what `call` has stored"):
        model.fit(X, ONE_HOT, batch_size=12, verbose=0)


@pytest.mark.parametrize("counting", [4, 6, 7])
def test_samples_without_weight_come_first(counting):
    model = OwnComputeLoss()
    model(X)
    weight = np.zeros(len(X), "float32")
    weight[counting:] = 1.0
    step(model, {}, (X, ONE_HOT, weight), gamma=0.5)
    assert np.array(model.optimizer.report.losses).nonzero()[0].tolist() == [
        *range(counting, len(X))
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1.0, "ascend": Part(0.5)},
        {"select": Random(0.5), "ascend": Previous()},
        {"select": Random(0.5), "ascend": Part(0.5)},
    ],
    ids=str,
)
def test_a_loss_that_is_defined_only_for_matching_targets(settings):
    """Steps repeat the predictions for other samples, for which a loss may not be finite."""

    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=shape[-1:], initializer="ones")

        def call(self, x):
            return x * self.scale

    def loss(y, y_pred):
        return ops.mean(ops.square(ops.log(y * y_pred) - 1.0), axis=-1)

    x = np.linspace(-2.0, 2.0, 24).reshape(8, 3).astype("float32")
    model = keras.Sequential([keras.Input((3,)), Scale()])
    optimizer = ESAM(keras.optimizers.SGD(0.05), rho=0.05, perturb=Everything(), **settings)
    model.compile(optimizer, loss)
    history = model.fit(x, np.sign(x), batch_size=8, epochs=10, verbose=0).history["loss"]
    (scale,) = trainable(model)
    assert np.all(scale > 1.0)
    assert np.all(np.isfinite(history))


@pytest.mark.parametrize("settings", SUBSETS, ids=str)
def test_a_regulariser_may_return_several_values(settings):
    """Keras takes their sum, which does not depend on the samples."""

    class Squares(keras.regularizers.Regularizer):
        def __call__(self, w):
            return 0.01 * ops.sum(w * w, axis=0)

    dense = keras.layers.Dense(3, kernel_regularizer=Squares())
    model = keras.Sequential([keras.Input((6,)), dense])
    model.compile(esam(**settings), "mse")
    model.train_on_batch(X, ONE_HOT)


@pytest.mark.parametrize("settings", SUBSETS, ids=str)
def test_an_added_loss_of_several_values_is_refused_on_some_samples(settings):
    class Penalty(keras.layers.Layer):
        def call(self, x):
            self.add_loss(ops.sum(ops.square(x), axis=-1))
            return x

    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), Penalty(name="penalty")])
    before = trainable(model)
    model.compile(esam(**settings), "mse")
    with pytest.raises(ESAMValueError, match=r"`add_loss` must get one number, the mean.*\(\d+,\)"):
        model.train_on_batch(X, ONE_HOT)
    close(trainable(model), before)
    model.compile(esam(gamma=1.0), "mse")
    model.train_on_batch(X, ONE_HOT)
