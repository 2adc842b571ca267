"""Directions that a model or a checkpoint does not allow: a clear error."""

import keras
import numpy as np
import pytest
from tests.keras.directed import X, Y, esam
from tests.keras.scene import cross_entropy, mlp, same, weights

from esam_core import ESAMRuntimeError, ESAMValueError
from esam_keras import Part, Previous, TopLoss


def refused(model, optimizer, batch, match, loss=None):
    before = weights(model)
    model.compile(optimizer, loss or cross_entropy())
    with pytest.raises(ESAMValueError, match=match):
        model.train_on_batch(*batch)
    same(weights(model), before)


def test_a_part_needs_losses_per_sample():
    one_hot = np.eye(3, dtype="float32")[Y]
    refused(mlp(activation="softmax"), esam(ascend=Part(0.5)), (X, one_hot), r"Part", "dice")
    model = mlp(activation="softmax")
    model.compile(esam(ascend=Previous()), "dice")  # needs no losses per sample
    model.train_on_batch(X, one_hot)
    model.train_on_batch(X, one_hot)
    assert model.optimizer.report.loss is None
    assert float(model.optimizer.report.perturbation_norm) > 0


def test_a_part_with_a_fixed_batch_size_is_refused():
    fixed = keras.Sequential(
        [
            keras.Input(batch_shape=(12, 6)),
            keras.layers.Reshape((6, 1)),
            keras.layers.LSTM(3, stateful=True),
        ]
    )
    refused(fixed, esam(ascend=Part(0.5)), (X, Y), r"ascend=Part\(\.\.\.\)")


@pytest.mark.backends("tensorflow", "torch")
def test_weights_assigned_only_in_a_perturbed_call_are_refused():
    layers = keras.layers

    def normalised():
        inner = layers.Dense(3)
        return keras.Sequential([keras.Input((6,)), layers.SpectralNormalization(inner)])

    model = normalised()
    model.compile(esam(ascend=Previous()), cross_entropy())
    model.train_on_batch(X, Y)
    before = weights(model)
    with pytest.raises(ESAMRuntimeError, match=r"SpectralNormalization.*ascend=Previous"):
        model.train_on_batch(X, Y)
    same(weights(model), before)
    for ascend, select in ((Part(0.5), {}), (Previous(), {"gamma": None, "select": TopLoss(0.5)})):
        model = normalised()
        model.compile(esam(ascend=ascend, **select), cross_entropy())
        model.fit(X, Y, batch_size=6, epochs=2, verbose=0)
        assert model.optimizer.report.perturbed


def test_a_direction_of_another_model_is_refused():
    models = [mlp(), mlp(features=4)]
    stores = []
    for model, x in zip(models, (X, X[:, :4]), strict=True):
        model.compile(esam(ascend=Previous()), cross_entropy())
        model.train_on_batch(x, Y)
        stores.append({})
        model.optimizer.save_own_variables(stores[-1])
    before = [np.array(v.value) for v in models[0].optimizer.variables]
    with pytest.raises(ESAMValueError, match=r"direction in a checkpoint.*first_kernel"):
        models[0].optimizer.load_own_variables(stores[1])
    same([np.array(v.value) for v in models[0].optimizer.variables], before)
    with pytest.warns(UserWarning, match="The state of ESAM was not loaded.*13 saved variables"):
        esam().load_own_variables({str(i): np.zeros(()) for i in range(13)})
