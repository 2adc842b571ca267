"""The benchmark of epochs in Keras."""

import json

import keras
import numpy as np
import pytest
from benchmarks.keras_by_hand import RHO, ByHand
from benchmarks.keras_epochs import BY_HAND, SETTINGS, main, network

from esam_keras import ESAM

# Keras's.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_the_command_runs(tmp_path, capsys):
    main(["--quick", "--out", str(tmp_path)])
    assert "six masks" in capsys.readouterr().out
    rows = json.loads((tmp_path / "keras.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == [*SETTINGS, BY_HAND]
    counted = {row["setting"]: row["counted"] for row in rows}
    assert counted["SGD"] == 1.0 and counted["SAM"] == 2.0
    assert 1.1 < counted["Suffix(0.5), Proportional(0.5)"] < 1.3
    assert all(row["first"] > 0.0 and row["later"] > 0.0 for row in rows)


def test_the_control_makes_esams_step():
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype("float32")
    y = np.arange(8) % 10
    trained = []
    for kind, optimizer in (
        (ByHand, keras.optimizers.SGD(0.5)),
        (keras.Sequential, ESAM(keras.optimizers.SGD(0.5), rho=RHO, beta=1.0)),
        (keras.Sequential, keras.optimizers.SGD(0.5)),
    ):
        keras.utils.set_random_seed(0)
        model = network(2, 4, kind)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss)
        model.fit(x, y, batch_size=8, verbose=0)
        trained.append(np.concatenate([v.numpy().ravel() for v in model.trainable_variables]))
    by_hand, esam, sgd = trained
    np.testing.assert_allclose(by_hand, esam, rtol=1e-4, atol=1e-5)
    assert np.abs(by_hand - sgd).max() > 1e-2
