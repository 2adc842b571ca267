"""`ascend=` in `fit`: logs, saved models, compiled functions and the state after a step."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.counting import traces
from tests.keras.scene import Oracle, close, cross_entropy, data, mlp, same, trainable, weights

import esam_keras
from esam_core import ESAMValueError
from esam_core.cost import expected_cost
from esam_keras import (
    ESAM,
    All,
    Everything,
    Momentum,
    Part,
    Previous,
    Random,
    RandomSuffix,
    Suffix,
    TopIncrease,
    TopLoss,
    unit_records,
)
from esam_keras.plan import BASE

BACKEND = keras.backend.backend()
X, Y = data(16)
SOURCES = (Part(0.5), Previous(), Momentum())


def esam(momentum=0.9, **settings):
    settings = {"rho": 0.3, "perturb": Everything(), "gamma": 1.0, **settings}
    return ESAM(keras.optimizers.SGD(0.1, momentum=momentum), **settings)


def normalised(*more):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.BatchNormalization(name="norm"),
            *more,
            keras.layers.Dense(3, name="head"),
        ]
    )


def everything(model):
    variables = (*model.variables, *model.optimizer.variables)
    return [np.array(ops.convert_to_numpy(v.value)) for v in variables]


def train(model, epochs=1, **kwargs):
    return model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **kwargs).history


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_a_loaded_model_continues_like_an_uninterrupted_run(ascend, tmp_path):
    model = normalised()
    model.compile(esam(perturb=Suffix("norm"), gamma=0.5, ascend=ascend, seed=9), cross_entropy())
    train(model)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert loaded.optimizer.config.ascend == ascend
    same(everything(loaded), everything(model))
    train(model)
    train(loaded)
    same(everything(loaded), everything(model))
    assert loaded.optimizer.report.perturbed


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_the_direction_differs_from_the_batch_gradient(ascend):
    """Otherwise the other tests here would also pass with `Batch()`."""
    found = []
    for source in (ascend, None):
        keras.utils.set_random_seed(2)
        model = mlp()
        model.compile(esam(ascend=source), cross_entropy(), run_eagerly=True)
        train(model)
        found.append(trainable(model))
    assert max(np.abs(a - b).max() for a, b in zip(*found, strict=True)) > 1e-4


@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_compiled_and_uncompiled_steps_are_equal(ascend):
    """Each mask is compiled separately; on JAX the rest of the step is shared."""
    found = []
    for eager in (False, True):
        keras.utils.set_random_seed(2)
        model = normalised(keras.layers.Dropout(0.3, seed=7))
        model.compile(
            esam(perturb=RandomSuffix(("norm", "head")), gamma=0.5, ascend=ascend),
            cross_entropy(),
            run_eagerly=eager,
            **({} if eager else {"steps_per_execution": 2}),
        )
        train(model)
        found.append(everything(model))
    close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.backends("tensorflow", "jax")
def test_a_first_base_step_needs_one_more_function(monkeypatch):
    model = mlp()
    model.compile(esam(ascend=Previous()), cross_entropy())
    with traces(monkeypatch) as seen:
        train(model, 2)
    assert len(seen) == 2
    assert seen[0] == BASE and seen[1].ascent.of == "earlier"


# -- the logs --------------------------------------------------------------------------------------


class Seen(keras.metrics.Metric):
    """The number of samples that the metrics receive."""

    def __init__(self):
        super().__init__(name="seen")
        self.seen = self.add_variable((), "zeros", name="seen")

    def update_state(self, y_true, y_pred, sample_weight=None):
        assert y_true.shape[0] == y_pred.shape[0]
        self.seen.assign_add(ops.cast(ops.shape(y_pred)[0], "float32"))

    def result(self):
        return self.seen + 0.0


SHOWN = (
    (Part(0.25), All(), 4),
    (Part(0.25), Random(0.5), 4),
    (Part(0.25), TopLoss(0.5), 16),
    (Previous(), All(), 16),
    (Previous(), Random(0.5), 8),
    (Previous(), TopIncrease(0.5), 16),
)


@pytest.mark.parametrize(("ascend", "select", "number"), SHOWN, ids=repr)
def test_loss_and_metrics_are_of_the_samples_seen_first(ascend, select, number):
    model = mlp()
    oracle = Oracle(model, {"loss": cross_entropy()}, (X, Y))
    settings = {"metrics": ["accuracy", Seen()], "run_eagerly": True}
    optimizer = esam(0.0, gamma=None, select=select, ascend=ascend)
    model.compile(optimizer, cross_entropy(), **settings)
    if ascend == Previous():
        model.train_on_batch(X, Y)
        model.reset_metrics()  # Keras 3.11 does not at each batch
    theta = trainable(model)
    logs = model.train_on_batch(X, Y, return_dict=True)
    report = optimizer.report
    assert float(logs["seen"]) == number
    np.testing.assert_allclose(float(logs["loss"]), float(report.loss), rtol=1e-5)
    if report.losses is None:
        places = np.arange(16) if report.indices is None else np.array(report.indices)
        assert len(report.perturbed_losses) == len(places) == number
        assert report.sharpness is None
    else:
        places = np.arange(16) if number == 16 else np.array(report.part)
        expected = oracle_losses(oracle, theta)[places]
        np.testing.assert_allclose(np.array(report.losses), expected, rtol=1e-4)
        right = predicted(oracle, theta)[places] == Y[places]
        np.testing.assert_allclose(float(logs["accuracy"]), right.mean(), rtol=1e-6)
    assert ("sharpness" in logs) == (report.sharpness is not None)
    if "sharpness" in logs:
        np.testing.assert_allclose(float(logs["sharpness"]), float(report.sharpness), rtol=1e-5)


@pytest.mark.parametrize("select", [All(), TopLoss(0.5)], ids=repr)
def test_losses_that_layers_add_count_with_a_part(select):
    class Adding(keras.layers.Layer):
        def call(self, x):
            self.add_loss(10.0 * ops.mean(x))
            return x

    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8), Adding(), keras.layers.Dense(3, name="head")]
    )
    optimizer = esam(1e-4, gamma=None, select=select, ascend=Part(0.5))
    model.compile(optimizer, cross_entropy(), run_eagerly=True)
    hidden = ops.convert_to_numpy(model.layers[0](X))
    logs = model.train_on_batch(X, Y, return_dict=True)
    report = optimizer.report
    added = 10.0 * hidden[ops.convert_to_numpy(report.part)].mean()
    found = float(logs["loss"]) - float(ops.convert_to_numpy(report.losses).mean())
    np.testing.assert_allclose(found, added, rtol=1e-4)
    assert abs(added) > 0.1


def test_losses_of_several_outputs_are_those_of_the_part():
    inputs = keras.Input((6,))
    outputs = [keras.layers.Dense(3, name=name)(inputs) for name in ("one", "two")]
    model = keras.Model(inputs, outputs)
    model.compile(esam(rho=5.0, ascend=Part(0.5)), [cross_entropy(), cross_entropy()])
    logs = model.train_on_batch(X, [Y, Y], return_dict=True)
    np.testing.assert_allclose(logs["one_loss"] + logs["two_loss"], logs["loss"], rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_divisor_of_masked_losses_is_that_of_the_part(seed):
    """Keras divides by the number of unmasked values; the other samples' masks are unknown."""
    tokens, labels = np.ones((8, 7), "int32"), np.arange(56).reshape(8, 7) % 3
    tokens[[3, 7], 1:] = 0
    model = keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            keras.layers.Embedding(9, 4, mask_zero=True),
            keras.layers.Dense(3),
        ]
    )
    base = keras.optimizers.SGD(0.0)
    optimizer = ESAM(base, rho=0.3, perturb=Everything(), gamma=1.0, ascend=Part(0.5), seed=seed)
    model.compile(optimizer, cross_entropy(), metrics=["accuracy"])
    logs = model.train_on_batch(tokens, labels, return_dict=True)
    part = ops.convert_to_numpy(optimizer.report.part)
    model.reset_metrics()
    alone = model.test_on_batch(tokens[part], labels[part], return_dict=True)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(logs[name], alone[name], rtol=1e-5)


def test_two_masks_are_refused_without_the_whole_batch():
    tokens, labels = np.ones((8, 7), "int32"), np.zeros((8, 7), "int32")
    for ascend, refused in ((Part(0.5), True), (None, False)):
        model = keras.Sequential(
            [
                keras.Input((7,), dtype="int32"),
                keras.layers.Embedding(9, 4, mask_zero=True),
                keras.layers.Dense(3),
            ]
        )
        model.compile(esam(ascend=ascend), cross_entropy(ignore_class=1))
        if refused:
            with pytest.raises(ESAMValueError, match=r"mask of its own.*ascend=Batch\(\)"):
                model.train_on_batch(tokens, labels)
        else:
            model.train_on_batch(tokens, labels)


def at(oracle, theta, function):
    before = weights(oracle.model)
    oracle.model.set_weights(theta)
    found = function()
    oracle.model.set_weights(before)
    return found


def predicted(oracle, theta):
    return at(oracle, theta, lambda: oracle.model.predict(X, verbose=0).argmax(axis=1))


def oracle_losses(oracle, theta):
    def losses():
        y_pred = oracle.model.predict(X, verbose=0)
        found = keras.losses.sparse_categorical_crossentropy(Y, y_pred, from_logits=True)
        return ops.convert_to_numpy(found)

    return at(oracle, theta, losses)


# -- the state after a step ------------------------------------------------------------------------


@pytest.mark.parametrize("ascend", SOURCES, ids=repr)
def test_generators_advance_as_in_one_forward(ascend):
    """Unseeded Dropout and torch modules have state that Keras does not manage."""
    found = []
    for source in (ascend, None):
        keras.utils.set_random_seed(2)
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
        )
        model.compile(esam(ascend=source, rho=1e-20), cross_entropy(), run_eagerly=True)
        for _ in range(3):
            model.train_on_batch(X, Y)
        found.append(weights(model))
    close(*found)


@pytest.mark.parametrize("ascend", [Previous(), Momentum()], ids=repr)
def test_a_direction_that_is_not_finite_does_not_reach_the_moving_statistics(ascend):
    model = normalised()
    model.compile(esam(ascend=ascend), cross_entropy())
    train(model)
    for variable in model.optimizer.variables:
        if variable.shape == (6, 8):  # of the first kernel
            variable.assign(np.full((6, 8), np.inf))
    model.train_on_batch(X[:4], Y[:4])
    norm = model.get_layer("norm")
    for variable in (norm.moving_mean, norm.moving_variance):
        assert np.isfinite(ops.convert_to_numpy(variable.value)).all()
    assert np.isnan(ops.convert_to_numpy(model.get_layer("head").kernel.value)).any()


class Outer(keras.Model):
    """Its `call` does not take `training`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        return self.inner(x)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("own", [False, True])
def test_buffers_of_torch_modules_are_from_the_descent(own):
    import torch

    norm = torch.nn.BatchNorm1d(6)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.TorchModuleWrapper(norm), keras.layers.Dense(3)]
    )
    if own:
        model = Outer(model)
    model.compile(esam(ascend=Part(0.25), rho=1e-20), cross_entropy())
    model.train_on_batch(X, Y)
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.1 * X.mean(0), rtol=1e-4, atol=1e-6)
    assert int(norm.num_batches_tracked) == 1


def test_a_custom_train_step():
    class Mine(keras.Sequential):
        def train_step(self, *arguments):
            return esam_keras.train_step(self, *arguments)

    for ascend in (Part(0.5), Previous()):
        found = []
        for kind in (Mine, keras.Sequential):
            keras.utils.set_random_seed(2)
            model = kind([keras.Input((6,)), keras.layers.Dense(3)])
            model.compile(esam(ascend=ascend), cross_entropy(), run_eagerly=True)
            train(model)
            found.append(trainable(model))
        close(*found)


def test_the_cost_model_prices_keras_models():
    units = unit_records(mlp())
    for ascend, select, ratio in (
        (Part(0.25), All(), 1.25),
        (Part(0.5), Random(0.5), 1.0),
        (Previous(), All(), 1.0),
        (Momentum(), Random(0.5), 0.5),
    ):
        found = expected_cost(Everything(), units, select, ascend=ascend, batch_size=16)
        assert found.ratio == pytest.approx(ratio)
