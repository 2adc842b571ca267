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
    "one layer in the middle": {"perturb": Only("*d2*", Everything()), "gamma": 0.25},
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


def sizes_of(b, n):
    """The sizes of the batches of an epoch."""
    return [b] * (n // b) + [n % b] * (n % b > 0)


SAMPLERS = {
    "Everything": Everything(),
    "Suffix": Suffix("second"),
    "Only": Only("bias", Everything()),
    "RandomSuffix": RandomSuffix(("second", "head"), (0.5, 0.5)),
    "Every": Every(2, Suffix("head")),
    "Between": Between(2, 5, Everything()),
    "Bernoulli": Bernoulli(0.5),
    "single weights": Bernoulli(0.5, unit="weight"),
}
#: How many functions each makes, of each batch size: one a listed mask, else one for all.
FUNCTIONS = dict.fromkeys(SAMPLERS, 1) | {"RandomSuffix": 2, "Every": 2, "Between": 2}


@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize(
    "name",
    # Compiling takes the time on JAX, and samplers of one mask are all alike.
    [n for n in SAMPLERS if BACKEND != "jax" or n not in ("Everything", "Only", "Between")],
)
def test_one_compilation_a_listed_mask_and_batch_size(name, monkeypatch):
    sampler, epochs, (x, y) = SAMPLERS[name], 5, data(11)
    model = mlp()
    optimizer = ESAM(keras.optimizers.SGD(0.01), perturb=sampler, seed=3)
    model.compile(optimizer, cross_entropy())
    with traces(monkeypatch) as seen:
        model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, shuffle=False)
    sizes = sizes_of(4, 11) * epochs
    units = unit_records(model)
    masks = [sampler.draw(units, seed=3, count=n) for n in range(len(sizes))]
    assert len(set(masks)) > 1 or FUNCTIONS[name] == 1
    # What is not listed is one function, and one more for the draws that are empty.
    listed = sampler.masks(units) is not None
    expected = {(mask if listed else mask.active, b) for mask, b in zip(masks, sizes, strict=True)}
    assert len(seen) == len(expected) == FUNCTIONS[name] * 2
    assert int(optimizer.count.numpy()) == len(sizes) == 15
    assert len(set(seen)) == FUNCTIONS[name]
    assert all((plan.scale is not None) == listed for plan in seen if plan.active)


@pytest.mark.backends("torch")
def test_uncompiled_steps_know_their_mask(monkeypatch):
    x, y = data(10)
    model = mlp()
    model.compile(ESAM(keras.optimizers.SGD(0.01), beta=0.5, seed=3), cross_entropy())
    with traces(monkeypatch) as seen:
        model.fit(x, y, batch_size=4, epochs=5, verbose=0, shuffle=False)
    assert len(seen) == 15
    assert all(plan.scale is not None for plan in seen if plan.active)
