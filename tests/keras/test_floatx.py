"""A default dtype of 16 bits: what is counted, compared and added up has more digits."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import data

from esam_core.selectors import select
from esam_keras import ESAM, Part, Proportional, Random, Suffix, TopIncrease, TopLoss

B = 600  # more than the digits of bfloat16 can count
X, _ = data(n=B)
Y = X[:, :1] * X[:, 1:2]


@pytest.fixture(params=["bfloat16", "float16"])
def floatx(request):
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def trained(**settings):
    """Return a model after one step, and its logs."""
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(ESAM("sgd", rho=0.2, **settings), "mse")
    return model, model.train_on_batch(X, Y, return_dict=True)


def numbers(tensor):
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")), dtype=np.float64)


@pytest.mark.usefixtures("floatx")
@pytest.mark.parametrize(
    "selector", [Proportional(0.5), TopLoss(0.5), Random(0.5), TopIncrease(0.5)], ids=str
)
def test_the_selection_is_that_of_the_losses_in_float32(selector):
    model, logs = trained(perturb=Suffix(0.5), select=selector)
    report = model.optimizer.report
    after = None if report.perturbed_losses is None else numbers(report.perturbed_losses)
    before = np.zeros(B) if report.losses is None else numbers(report.losses)
    expected = select(selector, before, after, seed=0, count=0)
    indices = numbers(report.indices)
    assert len(set(indices)) == len(indices) == 300
    if selector.rule != "proportional":
        np.testing.assert_array_equal(indices, expected.indices)
    else:  # an interval may end at a point
        assert len(set(indices) - set(expected.indices)) <= 2
    np.testing.assert_allclose(numbers(report.sample_weights).sum(), expected.weights.sum(), 1e-3)
    if selector.score == "increase":
        np.testing.assert_allclose(float(logs["sharpness"]), np.mean(after - before), rtol=1e-4)


@pytest.mark.usefixtures("floatx")
@pytest.mark.parametrize("settings", [{}, {"ascend": Part(0.25), "gamma": 1.0}], ids=str)
def test_a_mask_as_an_input_and_a_part(settings):
    model, logs = trained(**settings)
    assert 0.0 < float(logs["loss"]) < 100.0
    assert all(np.isfinite(numbers(v.value)).all() for v in model.trainable_variables)
