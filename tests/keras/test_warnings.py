"""Warnings point at the user's line, where Python can skip the files between: from 3.12 on."""

import inspect
import linecache
import sys
import warnings
from pathlib import Path

import keras
import pytest
from tests.keras.scene import data, mlp

import esam_keras
from esam_keras import ESAM, Only

PACKAGE = str(Path(esam_keras.__file__).parent)


def line():
    """Return the line number of the call of this function."""
    return inspect.currentframe().f_back.f_lineno


def check(found, text, where):
    """Require one warning with this text, at this line of this file; before 3.12, at its origin."""
    (warning,) = [w for w in found if text in str(w.message)]
    if sys.version_info >= (3, 12):
        assert (warning.filename, warning.lineno) == (__file__, where)
    else:
        assert warning.filename.startswith(PACKAGE)
        assert "warn_user(" in linecache.getline(warning.filename, warning.lineno)


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_model_without_trainable_weights(how, run_eagerly):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Activation("tanh")])
    model.compile(ESAM("sgd"), "mse", run_eagerly=run_eagerly)
    x, _ = data()
    where = line() + 2
    with pytest.warns(UserWarning, match="no trainable weights") as found:
        getattr(model, how)(x, x)
    check(found, "no trainable weights", where)


@pytest.mark.parametrize("rho", [0.1, 0.0])
def test_a_sampler_that_reaches_no_weights(rho):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile(ESAM("sgd", rho=rho, perturb=Only("norm")), "mse")
    x, _ = data()
    text = "perturb=Only(kind='norm', inner=Everything()) reaches none"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(x, x[:, :3], epochs=2, verbose=0)
    assert sum(text in str(w.message) for w in found) == (rho > 0.0)


def test_a_normalisation_layer_of_ones_own_is_reached():
    class ScaleNorm(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return self.scale * x

    model = keras.Sequential([keras.Input((6,)), ScaleNorm(), keras.layers.Dense(3)])
    model.compile(ESAM("sgd", perturb=Only("norm")), "mse")
    x, _ = data()
    model.fit(x, x[:, :3], verbose=0)  # warnings are errors
    (name,) = model.optimizer.report.perturbed
    assert "scale_norm" in name


def test_a_model_with_its_own_train_step():
    class Own(keras.Sequential):
        def train_step(self, *arguments):
            return esam_keras.train_step(self, *arguments)

    model = Own([keras.Input((6,)), keras.layers.Activation("tanh")])
    model.compile(ESAM("sgd"), "mse")
    x, _ = data()
    where = line() + 2
    with pytest.warns(UserWarning, match="no trainable weights") as found:
        model.fit(x, x, verbose=0)
    check(found, "no trainable weights", where)


@pytest.mark.filterwarnings("ignore:Skipping variable loading")  # Keras's, for the base optimizer
def test_a_state_that_is_not_loaded(tmp_path):
    path = tmp_path / "plain.weights.h5"
    plain = mlp()
    plain.compile("adam", "mse")
    plain.save_weights(path)
    model = mlp()
    model.compile(ESAM("adam"), "mse")
    where = line() + 2
    with pytest.warns(UserWarning, match="state of ESAM was not loaded") as found:
        model.load_weights(path)
    check(found, "state of ESAM was not loaded", where)
