"""Models whose inputs and outputs do not have one row per sample."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.odd import X, Y, esam
from tests.keras.scene import close, cross_entropy, same, trainable

from esam_core import ESAMValueError
from esam_keras import ESAM, Everything, Part, Previous, Random, TopLoss


def test_an_output_without_a_row_per_sample():
    keras.utils.set_random_seed(0)
    x = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(x)
    logits = keras.layers.Dense(3, name="logits")(hidden)
    model = keras.Model(x, {"logits": logits, "aux": ops.mean(hidden)})
    model.compile(esam(beta=1.0, gamma=0.5), {"logits": cross_entropy()})
    history = model.fit(X, {"logits": Y}, batch_size=8, verbose=0).history
    assert np.isfinite(history["loss"][-1])


class Prototypes(keras.Model):
    """An output of n rows that are not the samples', and outputs that are not tensors."""

    def __init__(self, n, penalty):
        super().__init__()
        self.head = keras.layers.Dense(3)
        self.table = self.add_weight(shape=(n, 3), name="table")
        self.penalty = penalty

    def call(self, x):
        return {"logits": self.head(x), "table": 1.0 * self.table, "none": None, "number": 0.5}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        each = keras.losses.sparse_categorical_crossentropy(y, y_pred["logits"], from_logits=True)
        weight = 1.0 if sample_weight is None else sample_weight
        return ops.mean(each * weight) + self.penalty * ops.sum(ops.square(y_pred["table"]))


SUBSETS = [
    {"select": TopLoss(0.5)},
    {"select": TopLoss(0.5), "ascend": Part(0.5)},
    {"gamma": 1.0, "ascend": Part(0.5)},
    {"select": Random(0.5), "ascend": Previous()},
]


@pytest.mark.parametrize("n", [3, 4, 8])
@pytest.mark.parametrize("settings", [{"gamma": 1.0}, *SUBSETS], ids=str)
def test_an_output_with_other_rows(n, settings):
    """Batches have 8 samples, of which 4 are run: the table's gradient is that of its penalty."""
    model = Prototypes(n, penalty=0.25)
    model(X)
    before = np.array(model.table)
    optimizer = ESAM(keras.optimizers.SGD(1.0), rho=1e-5, perturb=Everything(), **settings)
    model.compile(optimizer)
    model.fit(X[:16], Y[:16], batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(np.array(model.table), 0.25 * before, rtol=1e-3, atol=1e-4)


class SharedTable(keras.Model):
    """One input with a row per sample, and one for all samples."""

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(3)

    def call(self, x):
        return self.head(x["features"]) + ops.mean(x["table"])


@pytest.mark.parametrize("table", [np.ones((20, 3), "float32"), np.ones((4, 3), "float32")])
@pytest.mark.parametrize("settings", SUBSETS, ids=str)
def test_an_input_without_a_row_per_sample_is_refused(table, settings):
    model = SharedTable()
    model.compile(esam(perturb=Everything(), **settings), cross_entropy())
    start = (({"features": X[:8], "table": X[:8]}, Y[:8]) for _ in range(1))
    later = (({"features": X[:8], "table": table}, Y[:8]) for _ in range(1))
    model.fit(start, steps_per_epoch=1, shuffle=False, verbose=0)
    before = trainable(model)
    with pytest.raises(ESAMValueError, match=r"x\['table'\] of shape .* in a batch of 8"):
        model.fit(later, steps_per_epoch=1, shuffle=False, verbose=0)
    same(trainable(model), before)
    fresh = SharedTable()
    fresh.compile(esam(perturb=Everything(), **settings), cross_entropy())
    with pytest.raises(ESAMValueError, match="must have one row per sample"):
        fresh.train_on_batch({"features": X[:8], "table": table}, Y[:8])


def test_an_input_without_a_row_per_sample_works_in_sam():
    def trained(optimizer):
        keras.utils.set_random_seed(0)
        model = SharedTable()
        model.compile(optimizer, cross_entropy())
        batches = (({"features": X[:8], "table": X}, Y[:8]) for _ in range(2))
        model.fit(batches, steps_per_epoch=2, shuffle=False, verbose=0)
        return trainable(model)

    plain = trained(keras.optimizers.SGD(0.1))
    close(trained(esam(rho=1e-6, gamma=1.0, perturb=Everything())), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"gamma": 1.0, "ascend": Part(0.25)}], ids=str)
def test_predictions_for_pairs_of_samples_are_refused(settings):
    """Logits of each query for all keys of the batch."""

    class Pairs(keras.Model):
        def __init__(self):
            super().__init__()
            self.query, self.key = keras.layers.Dense(4), keras.layers.Dense(4)

        def call(self, x):
            return ops.matmul(self.query(x), ops.transpose(self.key(x)))

    x, labels = X[:8], np.arange(8)
    model = Pairs()
    model.compile(ESAM("sgd", **settings), cross_entropy())
    with pytest.raises(ESAMValueError, match=r"one sample.*output of shape \(8, 8\)"):
        model.train_on_batch(x, labels)
    model.compile(ESAM("sgd", gamma=1.0), cross_entropy())
    model.train_on_batch(x, labels)
