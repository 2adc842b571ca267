"""What the mask and the selection let a step skip is skipped: FLOPs and compilations, counted."""

import keras
import numpy as np
import pytest
from tests.keras.counting import flops, traces
from tests.keras.scene import cross_entropy, data, mlp

from esam_core import cost
from esam_keras import (
    ESAM,
    Bernoulli,
    Between,
    Every,
    Everything,
    Only,
    RandomSuffix,
    Suffix,
    TopLoss,
    unit_records,
)

BACKEND = keras.backend.backend()
B, WIDTH, LAYERS = 64, 96, 5
#: What is not a matrix product is free in `cost.py`: activations, selection, the update. On torch
#: and TensorFlow the products alone are counted, and must agree to the last operation; JAX's cost
#: analysis counts everything.
TOLERANCE = {"torch": 1e-12, "jax": 0.02, "tensorflow": 1e-12}[BACKEND]


def chain():
    layers = [
        keras.layers.Dense(WIDTH, activation="relu", name=f"d{i}", use_bias=i % 2 == 0)
        for i in range(LAYERS)
    ]
    return keras.Sequential([keras.Input((WIDTH,)), *layers])


def cost_of(optimizer, build=chain):
    model = build()
    model.compile(optimizer, cross_entropy())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, WIDTH)).astype("float32")
    return flops(model, x, rng.integers(0, WIDTH, B)), model


@pytest.fixture(scope="module")
def base():
    """The FLOPs of a step of the plain Keras optimizer, as Keras makes it."""
    return cost_of(keras.optimizers.SGD(0.1))[0]


CASES = {
    "an empty mask": {"perturb": Between(1, None, Everything())},
    "SAM": {"perturb": Everything(), "gamma": 1.0},
    "all, half of the samples": {"perturb": Everything(), "gamma": 0.5},
    "a late suffix": {"perturb": Suffix("d3"), "gamma": 0.5},
    "a late suffix, all samples": {"perturb": Suffix("d3"), "gamma": 1.0},
    "the last layer by loss": {"perturb": Suffix("d4"), "select": TopLoss(0.5)},
    "one layer in the middle": {"perturb": Only("d2*", Everything()), "gamma": 0.25},
    "the full norm": {"perturb": Suffix("d3"), "gamma": 0.5, "norm": "full"},
}


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_cost_model(name, base):
    esam = ESAM(keras.optimizers.SGD(0.1), **CASES[name])
    found, model = cost_of(esam)
    units = unit_records(model)
    mask = esam.config.perturb.draw(units, seed=0, count=0)
    predicted = cost.step_cost(
        units, mask, esam.config.select, batch_size=B, norm=esam.config.norm
    ).ratio
    print(f"{BACKEND}: {name}: {found / base:.3f} of a base step, {predicted:.3f} predicted")
    np.testing.assert_allclose(found / base, predicted, rtol=TOLERANCE)
