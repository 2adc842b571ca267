"""Losses that draw random numbers or call layers: part of each pass, like the forward."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import close, data, trainable

from esam_keras import ESAM, Everything, Part, Previous, Suffix, TopIncrease

X, _ = data(16)
TARGETS = X[:, :3].copy()


def from_torch(shape):
    import torch

    return torch.randn(shape)


class Noisy(keras.Model):
    """Each sample's loss is weighted by a random number."""

    def __init__(self, draws, dropout=0.0):
        super().__init__()
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.dropout = keras.layers.Dropout(dropout)
        self.head = keras.layers.Dense(3)
        self.generator = keras.random.SeedGenerator(5)
        self.draws = draws

    def call(self, x):
        return self.head(self.dropout(self.hidden(x)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        each = keras.losses.mean_squared_error(y, y_pred)
        if training:
            b = ops.shape(each)[:1]
            drawn = (
                keras.random.normal(b, seed=self.generator)
                if self.draws == "keras"
                else from_torch(b)
            )
            each = each * (2.0 + drawn)
        return ops.mean(each if sample_weight is None else each * sample_weight)


def generators():
    """The sources of random numbers on the current backend."""
    return ["keras", "torch"] if keras.backend.backend() == "torch" else ["keras"]


@pytest.mark.parametrize("draws", generators())
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "settings",
    [{"rho": 0.0}, {}, {"gamma": 0.5}, {"ascend": Previous()}, {"ascend": Part(0.5)}],
    ids=str,
)
def test_random_numbers_of_a_loss_advance_once_per_step(draws, dropout, settings):
    """Each step has the loss of a step of the base optimizer."""
    found = []
    part = isinstance(settings.get("ascend"), Part)
    esam = ESAM(
        keras.optimizers.SGD(0.0),
        **{"rho": 1e-7, "perturb": Everything(), "gamma": 1.0, **settings},
    )
    for optimizer in (keras.optimizers.SGD(0.0), esam):
        keras.utils.set_random_seed(0)
        model = Noisy(draws, dropout)
        model(X)
        keras.utils.set_random_seed(1)
        model.compile(optimizer)
        losses = []
        for _ in range(3):
            logs = model.train_on_batch(X, TARGETS, return_dict=True)
            losses.append(float(logs["loss"]))
            model.reset_metrics()
        found.append(losses)
    base, ours = found
    assert len({round(loss, 5) for loss in base}) == 3
    if part:  # its loss is that of the part, but the noise differs from step to step
        assert len({round(loss, 5) for loss in ours}) == 3
    else:
        np.testing.assert_allclose(ours, base, rtol=1e-4)


@pytest.mark.parametrize("draws", generators())
def test_random_numbers_of_a_loss_are_the_same_in_all_passes(draws):
    model = Noisy(draws)
    esam = ESAM("sgd", rho=1e-7, perturb=Everything(), select=TopIncrease(0.5))
    model.compile(esam)
    for _ in range(2):
        model.train_on_batch(X, TARGETS)
        np.testing.assert_allclose(ops.convert_to_numpy(esam.report.increases), 0.0, atol=1e-5)


@pytest.mark.backends("torch")
class TestTorchModules:
    """torch modules that a loss calls, like layers of Keras with the same weights."""

    def model(self, kind):
        import torch

        class Coder(keras.Model):
            def __init__(self):
                super().__init__()
                self.encoder = keras.layers.Dense(4, activation="tanh", name="encoder")
                decoder = keras.layers.Dense(6, name="decoder")
                decoder.build((None, 4))
                if kind != "keras":
                    linear = torch.nn.Linear(4, 6)
                    with torch.no_grad():
                        linear.weight.copy_(decoder.kernel.value.T)
                        linear.bias.copy_(decoder.bias.value)
                    decoder = linear
                self.decoder = decoder

            def call(self, x):
                return self.encoder(x)

            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                decode = self.decoder.module if kind == "its module" else self.decoder
                each = keras.losses.mean_squared_error(x, decode(y_pred))
                return ops.mean(each if sample_weight is None else each * sample_weight)

        keras.utils.set_random_seed(0)
        model = Coder()
        model(X)
        return model

    @pytest.mark.parametrize("kind", ["a module", "its module"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"gamma": 1.0, "perturb": Everything()},
            {"gamma": 0.5, "perturb": Everything()},
            {"gamma": 1.0, "perturb": Suffix("encoder")},
        ],
        ids=str,
    )
    def test_called_by_a_loss_are_perturbed_and_trained(self, kind, settings):
        found = []
        for each in ("keras", kind):
            model = self.model(each)
            model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.5, **settings))
            for _ in range(3):
                model.train_on_batch(X, TARGETS)
            found.append(
                sorted(
                    (
                        w.shape[::-1] if w.ndim == 1 else tuple(sorted(w.shape)),
                        float(np.square(w).sum()),
                    )
                    for w in trainable(model)
                )
            )
        for (shape, size), (other, again) in zip(*found, strict=True):
            assert shape == other
            np.testing.assert_allclose(again, size, rtol=1e-5)

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("gamma", [1.0, 0.5])
    def test_checkpointed_run_again_at_the_same_weights(self, inside, gamma):
        import torch
        from torch.utils.checkpoint import checkpoint

        class Parts(torch.nn.Module):
            def __init__(self, saves):
                super().__init__()
                self.parts = torch.nn.Sequential(
                    torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh()
                )
                self.saves = saves

            def forward(self, x):
                return (
                    checkpoint(self.parts, x, use_reentrant=False) if self.saves else self.parts(x)
                )

        class Around(keras.layers.Layer):
            def __init__(self, saves):
                super().__init__()
                self.part = keras.layers.TorchModuleWrapper(Parts(saves and inside))
                self.saves = saves and not inside

            def call(self, x):
                return checkpoint(self.part, x, use_reentrant=False) if self.saves else self.part(x)

        found = []
        for saves in (False, True):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((6,)), Around(saves), keras.layers.Dense(3)])
            esam = ESAM(keras.optimizers.SGD(0.1), rho=0.5, perturb=Everything(), gamma=gamma)
            model.compile(esam, "mse")
            for _ in range(3):
                model.train_on_batch(X, TARGETS)
            found.append(trainable(model))
        close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.backends("torch")
def test_a_checkpointed_layer_normalises_one_sample_as_in_its_forward():
    def trained(saves):
        keras.utils.set_random_seed(0)
        import torch
        from torch.utils.checkpoint import checkpoint

        class Around(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(8)
                self.norm = keras.layers.BatchNormalization()
                self.module = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(8))

            def build(self, shape):
                self.dense.build(shape)
                self.norm.build((None, 8))

            def inside(self, x, training):
                return self.module(self.norm(self.dense(x), training=training), training=training)

            def call(self, x, training=None):
                if saves:
                    return checkpoint(self.inside, x, training, use_reentrant=False)
                return self.inside(x, training)

        model = keras.Sequential([keras.Input((6,)), Around(), keras.layers.Dense(3)])
        esam = ESAM(keras.optimizers.SGD(0.1), rho=0.5, perturb=Everything(), gamma=0.05)
        model.compile(esam, "mse")
        for _ in range(2):
            model.train_on_batch(X, TARGETS)
        return trainable(model)

    close(trained(True), trained(False), rtol=1e-5, atol=1e-6)
