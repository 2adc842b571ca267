"""Steps skip work that the mask and the selection do not need: counted FLOPs and compilations."""

import keras
import numpy as np
import pytest
from tests.keras.counting import flops, traces
from tests.keras.scene import cross_entropy, data, mlp

from esam_keras import (
    ESAM,
    Bernoulli,
    Between,
    Every,
    Everything,
    Momentum,
    Only,
    Part,
    Previous,
    Random,
    RandomSuffix,
    Suffix,
    TopLoss,
    unit_records,
)

BACKEND = keras.backend.backend()
B, WIDTH, LAYERS = 64, 96, 5
#: On torch and TensorFlow only matrix products are counted, and must agree exactly. JAX's cost
#: analysis also counts activations, selection and update.
TOLERANCE = {"torch": 1e-12, "jax": 0.02, "tensorflow": 1e-12}[BACKEND]
#: In base steps: epsilon and the update, which JAX counts, do not shrink with the batch. Nor does
#: the selection of the losses of the samples that ran, 0.002 of a step of this small network.
FIXED = {"torch": 0.0, "jax": 0.022, "tensorflow": 0.0}[BACKEND]


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
    """The FLOPs of a step with the plain Keras optimizer."""
    return cost_of(keras.optimizers.SGD(0.1, momentum=0.9))[0]


#: A base step: five layer forwards, four activation gradients and five weight gradients.
BASE = 5 + 4 + 5
#: The settings of a step, its cost in layer forwards, and the number of forwards that a compiler
#: saves by merging: layers before the first perturbed one are the same at theta and theta + eps.
CASES = {
    "an empty mask": ({"perturb": Between(1, None, Everything())}, BASE, 0),
    "SAM": ({"perturb": Everything(), "gamma": 1.0}, 2 * BASE, 0),
    "all, half of the samples": ({"perturb": Everything(), "gamma": 0.5}, BASE + 5 + BASE / 2, 0),
    "a late suffix": ({"perturb": Suffix("d3"), "gamma": 0.5}, 5 + 1 + 2 + 5 + BASE / 2, 3),
    "a late suffix, all samples": ({"perturb": Suffix("d3"), "gamma": 1.0}, 5 + 1 + 2 + BASE, 3),
    "the last layer by loss": (
        {"perturb": Suffix("d4"), "select": TopLoss(0.5)},
        5 + 0 + 1 + BASE / 2,
        0,
    ),
    "one layer in the middle": (
        {"perturb": Only("*d2*", Everything()), "gamma": 0.25},
        5 + 2 + 1 + 5 + BASE / 4,
        2,
    ),
    "a quarter climbs": (
        {"perturb": Everything(), "gamma": 1.0, "ascend": Part(0.25)},
        BASE / 4 + BASE,
        0,
    ),
    "ascent on a quarter, a late suffix": (
        {"perturb": Suffix("d3"), "gamma": 1.0, "ascend": Part(0.25)},
        (5 + 1 + 2) / 4 + BASE,
        0,
    ),
    "ascent on a half, half by loss": (
        {"perturb": Everything(), "select": TopLoss(0.5), "ascend": Part(0.5)},
        BASE / 2 + 5 / 2 + BASE / 2,
        0,
    ),
    "the momentum": ({"perturb": Everything(), "gamma": 1.0, "ascend": Momentum()}, BASE, 0),
    "the momentum, a random half": (
        {"perturb": Everything(), "select": Random(0.5), "ascend": Momentum()},
        BASE / 2,
        0,
    ),
    "the full norm": (
        {"perturb": Suffix("d3"), "gamma": 0.5, "norm": "full"},
        BASE + 5 + BASE / 2,
        3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_are_only_those_that_the_mask_needs(name, base):
    settings, forwards, merged = CASES[name]
    found, _ = cost_of(ESAM(keras.optimizers.SGD(0.1, momentum=0.9), **settings))
    expected = (forwards - (merged if BACKEND != "torch" else 0)) / BASE
    print(f"{BACKEND}: {name}: {found / base:.3f} of a base step, {expected:.3f} expected")
    np.testing.assert_allclose(found / base, expected, rtol=TOLERANCE, atol=FIXED)


class Counted(keras.layers.Layer):
    """A layer that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def call(self, x):
        self.calls.append(x.shape[0])
        return x * 1.0


PASSES = {
    "no mask": ({"rho": 0.0}, [12]),
    "all samples": ({"gamma": 1.0}, [12, 12]),
    "half of the samples": ({"gamma": 0.5}, [12, 12, 6]),
    "half of the samples by loss": ({"select": TopLoss(0.5)}, [12, 6]),
}


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_one_forward_of_the_model(name):
    settings, expected = PASSES[name]
    model = mlp()
    counted = Counted()
    model = keras.Sequential([keras.Input((6,)), counted, *model.layers])
    esam = ESAM(keras.optimizers.SGD(0.1), **{"perturb": Suffix("second"), **settings})
    model.compile(esam, cross_entropy(), run_eagerly=True)
    x, y = data()
    model.train_on_batch(x, y)  # builds the model
    del counted.calls[:]
    model.train_on_batch(x, y)
    assert counted.calls == expected


@pytest.mark.backends("torch")
@pytest.mark.parametrize("start", ["first", "second", "head"])
def test_no_graph_is_built_below_the_first_perturbed_layer(start):
    import torch

    seen = []

    class Seen(keras.layers.Layer):
        def call(self, x):
            seen.append((self.name, x.requires_grad))
            return x

    first, second, head = mlp().layers
    layers = [first, Seen(name="after first"), second, Seen(name="after second"), head]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(ESAM("sgd", perturb=Suffix(start), gamma=1.0), cross_entropy())
    x, y = data()
    model.train_on_batch(x, y)
    del seen[:]
    model.train_on_batch(x, y)
    ascent, descent = dict(seen[:2]), dict(seen[2:])
    assert ascent == {
        "after first": start == "first",
        "after second": start in ("first", "second"),
    }
    assert all(descent.values())
    assert all(isinstance(v.value, torch.nn.Parameter) for v in model.trainable_variables)
    assert all(v.value.requires_grad for v in model.trainable_variables)


def sizes_of(b, n):
    """Return the sizes of the batches of an epoch."""
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
#: The number of functions per batch size: one per listed mask, else one for all masks.
FUNCTIONS = dict.fromkeys(SAMPLERS, 1) | {"RandomSuffix": 2, "Every": 2, "Between": 2}


@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize(
    "name",
    # Compiling is slow on JAX, and all samplers with one mask behave the same.
    [n for n in SAMPLERS if BACKEND != "jax" or n not in ("Everything", "Only", "Between")],
)
def test_one_compilation_per_listed_mask_and_batch_size(name, monkeypatch):
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
    # Unlisted masks share one function, with one more for empty draws.
    listed = sampler.masks(units) is not None
    expected = {(mask if listed else mask.active, b) for mask, b in zip(masks, sizes, strict=True)}
    assert len(seen) == len(expected) == FUNCTIONS[name] * 2
    assert int(optimizer.count.numpy()) == len(sizes) == 15
    assert len(set(seen)) == FUNCTIONS[name]
    assert all((plan.scale is not None) == listed for plan in seen if plan.active)


@pytest.mark.backends("jax")
def test_everything_after_the_ascent_is_compiled_once_for_all_masks(monkeypatch):
    model = mlp()
    sampler = RandomSuffix(("first", "second", "head"))
    model.compile(ESAM(keras.optimizers.SGD(0.01), perturb=sampler), cross_entropy())
    with (
        traces(monkeypatch, "ascend") as ascents,
        traces(monkeypatch, "climb") as climbs,
        traces(monkeypatch, "descend") as descents,
    ):
        model.fit(*data(12), batch_size=2, epochs=2, verbose=0)
    assert len(ascents) == len(set(ascents)) == 3
    assert len(climbs) == len(descents) == 1


@pytest.mark.backends("jax")
def test_without_an_ascent_pass_one_function_serves_all_masks(monkeypatch):
    model = mlp()
    sampler = RandomSuffix(("first", "second", "head"))
    optimizer = ESAM(keras.optimizers.SGD(0.01), perturb=sampler, ascend=Previous(), gamma=1.0)
    model.compile(optimizer, cross_entropy())
    with traces(monkeypatch) as seen:
        model.fit(*data(12), batch_size=2, epochs=3, verbose=0)
    assert [plan.active for plan in seen] == [False, True]  # there is no direction at first


@pytest.mark.backends("torch")
def test_uncompiled_steps_know_their_mask(monkeypatch):
    x, y = data(10)
    model = mlp()
    model.compile(ESAM(keras.optimizers.SGD(0.01), beta=0.5, seed=3), cross_entropy())
    with traces(monkeypatch) as seen:
        model.fit(x, y, batch_size=4, epochs=5, verbose=0, shuffle=False)
    assert len(seen) == 15
    assert all(plan.scale is not None for plan in seen if plan.active)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("layers", [4, 16])
def test_dispatched_operations_grow_with_the_tensors(layers):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count = getattr(self, "count", 0) + 1
            return function(*args, **(kwargs or {}))

    def dispatched(optimizer):
        hidden = [keras.layers.Dense(6, activation="relu") for _ in range(layers)]
        model = keras.Sequential([keras.Input((6,)), *hidden])
        model.compile(optimizer, cross_entropy())
        x, y = data()
        model.train_on_batch(x, y)
        with Counting() as counting:
            model.train_on_batch(x, y)
        return counting.count

    sgd = dispatched(keras.optimizers.SGD(0.1, momentum=0.9))
    esam = ESAM(keras.optimizers.SGD(0.1, momentum=0.9), perturb=Everything(), gamma=1.0)
    # With the lowest versions (Keras 3.11, torch 2.6) a step dispatches 10 more, and one for each
    # tensor: its weights are copied one by one. (One of these operations avoids a NaN constant.)
    newest = hasattr(torch, "_foreach_clone")
    more = 45 if newest else 55 + 2 * layers
    assert dispatched(esam) <= 2 * sgd + 2 * (2 * layers) + more
