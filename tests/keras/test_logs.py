"""Loss and metrics are those of the pass at theta; sharpness and sample share are added."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import Oracle, close, cross_entropy, data, mlp, trainable, weights

from esam_keras import (
    ESAM,
    Between,
    Everything,
    Part,
    Previous,
    Random,
    RunningMeans,
    TopLoss,
    train_step,
)
from esam_keras.report import KerasReport

X, Y = data()


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.logs, self.reports = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append({name: float(value) for name, value in logs.items()})
        self.reports.append(self.model.optimizer.report)


def test_loss_and_metrics_are_those_at_theta_once_on_the_whole_batch():
    class Counts(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="seen")
            self.seen = self.add_variable((), "zeros", name="seen")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.seen.assign_add(ops.cast(ops.shape(y_pred)[0], "float32"))

        def result(self):
            return self.seen + 0.0

    model = mlp()
    settings = {"loss": cross_entropy(), "metrics": ["accuracy", Counts()]}
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.5), **settings)
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)
    model.reset_metrics()
    logs = model.train_on_batch(X, Y, return_dict=True)
    for name in ("loss", "accuracy", "seen"):
        np.testing.assert_allclose(float(logs[name]), expected[name], rtol=1e-5)


def test_sharpness_is_the_mean_increase_of_the_losses():
    model = mlp()
    oracle = Oracle(model, {"loss": cross_entropy()}, (X, Y))
    climbed = oracle.climbed(rho=0.3)
    rise = oracle.single_losses(climbed) - oracle.single_losses(trainable(model))
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.3, beta=1.0, gamma=0.3), cross_entropy())
    logs = model.train_on_batch(X, Y, return_dict=True)
    np.testing.assert_allclose(float(logs["sharpness"]), rise.mean(), rtol=1e-3)
    np.testing.assert_allclose(float(logs["sample_share"]), 4 / 12, rtol=1e-6)


def test_history_has_the_means_of_the_epoch():
    watch = Watch()
    model = mlp()
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.3, gamma=0.5, beta=1.0), cross_entropy())
    history = model.fit(
        *data(11), batch_size=4, epochs=2, verbose=0, shuffle=False, callbacks=[watch]
    ).history
    rises = [float(r.sharpness) for r in watch.reports]
    for epoch in range(2):
        part = slice(3 * epoch, 3 * epoch + 3)
        np.testing.assert_allclose(history["sharpness"][epoch], np.mean(rises[part]), rtol=1e-5)
        np.testing.assert_allclose(
            history["sample_share"][epoch], np.mean([2 / 4, 2 / 4, 2 / 3]), rtol=1e-6
        )


def test_validation_has_no_sharpness():
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy(), metrics=["accuracy"])
    history = model.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert set(history) == {
        "loss",
        "accuracy",
        "sharpness",
        "sample_share",
        "val_loss",
        "val_accuracy",
    }
    assert set(model.evaluate(X, Y, verbose=0, return_dict=True)) == {"loss", "accuracy"}


def test_the_progress_bar_shows_them(capsys):
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy(), metrics=["accuracy"])
    model.fit(X, Y, verbose=2)
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in ("loss", "accuracy", "sharpness", "sample_share"))


def test_they_can_be_turned_off():
    model = mlp()
    model.compile(ESAM("sgd", logs=False), cross_entropy())
    assert list(model.fit(X, Y, verbose=0).history) == ["loss"]


def test_values_that_no_step_computes_are_not_logged():
    for selector in ({"gamma": 1.0}, {"select": TopLoss(0.5)}):
        model = mlp()
        model.compile(ESAM("sgd", **selector), cross_entropy())
        assert list(model.fit(X, Y, verbose=0).history) == ["loss", "sample_share"]


def test_steps_without_sharpness_do_not_count():
    watch = Watch()
    model = mlp()
    sampler = Between(1, None, Everything())
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.3, perturb=sampler), cross_entropy())
    model.fit(X, Y, batch_size=6, verbose=0, shuffle=False, callbacks=[watch])
    assert np.isnan(watch.logs[0]["sharpness"])
    rise = float(watch.reports[1].sharpness)
    np.testing.assert_allclose(watch.logs[1]["sharpness"], rise, rtol=1e-5)
    assert watch.logs[1]["sample_share"] == 0.75


def test_lists_of_train_on_batch_keep_their_length():
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy(), metrics=["accuracy"])
    assert len(model.train_on_batch(X, Y)) == 2
    assert len(model.train_on_batch(X, Y, return_dict=True)) == 4
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy())
    assert np.ndim(model.train_on_batch(X, Y)) == 0


def test_metrics_of_several_outputs_are_updated_once():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(3, name=n)(hidden) for n in "ab"])
    targets = [Y, np.eye(3, dtype="float32")[Y]]
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.5), [cross_entropy(), "mse"])
    expected = model.evaluate(X, targets, verbose=0, return_dict=True)
    assert set(expected) == {"loss", "a_loss", "b_loss"}
    logs = model.train_on_batch(X, targets, return_dict=True)
    for name, value in expected.items():
        np.testing.assert_allclose(float(logs[name]), value, rtol=1e-5)


def test_a_report_of_every_step():
    model = mlp()
    model.compile(ESAM(keras.optimizers.SGD(0.1), rho=0.3, beta=1.0, gamma=0.5), cross_entropy())
    assert model.optimizer.report is None
    before = weights(model)
    model.train_on_batch(X, Y)
    report = model.optimizer.report
    assert report.losses.shape == report.perturbed_losses.shape == (12,)
    assert report.indices.shape == report.sample_weights.shape == (6,)
    np.testing.assert_allclose(float(report.perturbation_norm), 0.3, rtol=1e-5)
    assert len(report.perturbed) == len(before) == 6
    assert report.weight_share == 1.0
    assert float(report.selected_sharpness) > float(report.rejected_sharpness)
    rises = np.sort(ops.convert_to_numpy(report.increases))
    np.testing.assert_allclose(float(report.threshold), rises[6], rtol=1e-6)
    np.testing.assert_allclose(float(report.sharpness), rises.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        float(report.perturbed_loss), float(report.loss) + rises.mean(), rtol=1e-5
    )


@pytest.mark.parametrize("score", ["sharpness", "sample_share"])
def test_callbacks_can_monitor_them(score):
    model = mlp()
    model.compile(ESAM("sgd"), cross_entropy())
    stop = keras.callbacks.EarlyStopping(monitor=score, patience=0, min_delta=10.0, mode="min")
    history = model.fit(X, Y, epochs=5, verbose=0, callbacks=[stop]).history
    assert len(history["loss"]) == 2


class Assigning(keras.Model):
    """Its `call` and its `compute_metrics` assign to variables that are not a metric's."""

    def __init__(self, trained):
        super().__init__()
        self.head = keras.layers.Dense(3)
        self.seen = self.add_weight(initializer="zeros", trainable=False, name="seen")

        self.trained = trained

    def call(self, x, training=False):
        if training:
            self.seen.assign_add(1.0)
            self.stranger.assign_add(1.0)
        return self.head(x)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.seen.assign(self.seen * 10.0)
        self.stranger.assign(self.stranger * 10.0 + 1.0)
        if self.trained:
            self.head.bias.assign(self.head.bias + 1.0)
        return super().compute_metrics(x, y, y_pred, sample_weight)


def assigning(trained):
    model = Assigning(trained)
    object.__setattr__(model, "stranger", keras.Variable(0.0, trainable=False))
    model(X)
    return model


@pytest.mark.parametrize("settings", [{"gamma": 1.0}, {"gamma": 0.5}], ids=str)
def test_variables_that_compute_metrics_assigns(settings):
    """On JAX, Keras drops the values, as it does with any optimizer."""
    found = []
    for optimizer in ("sgd", ESAM("sgd", **settings)):
        model = assigning(trained=False)
        model.compile(optimizer, cross_entropy())
        for _ in range(2):
            model.train_on_batch(X, Y)
        found.append((float(model.seen.value), float(model.stranger.value)))
    assert found[0] == found[1]
    assert (found[0] == (110.0, 121.0)) == (keras.backend.backend() != "jax")


@pytest.mark.backends("tensorflow", "torch")
def test_trained_weights_that_compute_metrics_assigns():
    found = []
    for optimizer in ("sgd", ESAM("sgd", rho=0.0)):
        keras.utils.set_random_seed(0)
        model = assigning(trained=True)
        model.compile(optimizer, cross_entropy())
        for _ in range(2):
            model.train_on_batch(X, Y)
        found.append(weights(model))
    close(*found, rtol=1e-6)


class Reading(keras.Model):
    """Its `compute_metrics` reads a trained weight, and calls the model again."""

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(3)

    def call(self, x):
        return self.head(x)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**logs, "size": ops.norm(self.head.kernel), "after": ops.mean(self(x) ** 2)}


def reading(optimizer, x=X):
    """Return the logs of one step, with the learning rate as a metric."""
    keras.utils.set_random_seed(0)
    model = Reading()

    def rate(y, y_pred):  # noqa: ARG001
        return ops.convert_to_tensor(model.optimizer.learning_rate)

    model.compile(optimizer, cross_entropy(), metrics=[rate])
    return model.fit(x, Y, batch_size=12, verbose=0).history


def halving():
    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5))


@pytest.mark.backends("tensorflow", "torch")  # Keras's JAX trainer measures before the update
@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
def test_metrics_see_the_model_and_the_optimizer_after_the_update(on_nonfinite):
    expected = reading(halving())
    logs = reading(ESAM(halving(), rho=0.0, on_nonfinite=on_nonfinite, logs=False))
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5, err_msg=name)
    assert expected["rate"] == [pytest.approx(0.05)]


@pytest.mark.backends("tensorflow", "torch")
def test_a_step_that_is_skipped_has_no_metrics():
    bad = X.copy()
    bad[3] = np.nan
    logs = reading(ESAM(halving(), on_nonfinite="skip", logs=False), bad)
    assert (logs["loss"], logs["rate"]) == ([0.0], [0.0])


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("how", ["train_on_batch", "own loop"])
@pytest.mark.parametrize("on_nonfinite", ["propagate", "skip"])
def test_an_error_in_a_metric_comes_after_the_update(on_nonfinite, how):
    """Uncompiled: a compiled step fails at tracing, before the update."""

    def train():
        if how == "own loop" and not isinstance(model.optimizer, keras.optimizers.SGD):
            train_step(model, (ops.convert_to_tensor(X), ops.convert_to_tensor(Y)))
        else:
            model.train_on_batch(X, Y)

    def fails(y, y_pred):  # noqa: ARG001
        if failing:
            raise FloatingPointError("in the metric")
        return ops.mean(y_pred)

    found = []
    for optimizer in ("sgd", ESAM("sgd", rho=0.0, on_nonfinite=on_nonfinite)):
        failing = False
        model = mlp()
        model.set_weights([np.full(w.shape, 0.1) for w in model.get_weights()])
        model.compile(optimizer, cross_entropy(), metrics=[fails], run_eagerly=True)
        train()
        failing = True
        with pytest.raises(FloatingPointError):
            train()
        found.append([*weights(model), int(model.optimizer.iterations)])
    close(*found, rtol=1e-6)
    assert int(model.optimizer.count) == 2
    failing = False
    train()
    assert int(model.optimizer.count) == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_means_of_reports_in_half_precision(dtype):
    """Sums in float16 overflow at 65504; in bfloat16 they soon stop growing."""
    losses = ops.convert_to_tensor([1000.0, 2000.0], dtype=dtype)
    perturbed = ops.convert_to_tensor([1504.0, 3000.0], dtype=dtype)
    indices = ops.convert_to_tensor([1], dtype="int32")
    report = KerasReport(count=0, losses=losses, perturbed_losses=perturbed, indices=indices)
    means = RunningMeans(("loss", "sharpness", "rejected_sharpness", "threshold"))
    for _ in range(600):
        means.update(report)
    increases = ops.convert_to_numpy(ops.cast(perturbed, "float32") - ops.cast(losses, "float32"))
    assert means.result() == {
        "loss": pytest.approx(1500.0),
        "sharpness": pytest.approx(increases.mean()),
        "rejected_sharpness": pytest.approx(increases[0]),
        "threshold": pytest.approx(increases[1]),
    }


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1.0, "ascend": Part(0.5)},
        {"select": TopLoss(0.5), "ascend": Part(0.5)},
        {"select": Random(0.5), "ascend": Previous()},
    ],
    ids=str,
)
def test_a_loss_divided_by_the_weights_is_that_of_the_samples_that_were_run(settings, run_eagerly):
    """The step divides by the weights of the whole batch, so that all passes have the same loss."""
    entry = keras.Input((6,))
    hidden = keras.layers.Dense(5, activation="tanh", kernel_regularizer="l2")(entry)
    heads = {name: keras.layers.Dense(3, name=name)(hidden) for name in ("a", "b")}
    model = keras.Model(entry, heads)
    loss = {"a": cross_entropy(reduction="mean_with_sample_weight"), "b": cross_entropy()}
    esam = ESAM(keras.optimizers.SGD(0.0), rho=1e-6, perturb=Everything(), **settings)
    model.compile(esam, loss, loss_weights={"a": 2.0, "b": 0.5}, run_eagerly=run_eagerly)
    y, sample_weight = {"a": Y, "b": Y}, np.arange(1.0, 13.0, dtype="float32")
    for _ in range(2):  # with `Previous`, the first is a base step
        logs = model.train_on_batch(X, y, sample_weight, return_dict=True)
    report = model.optimizer.report
    seen = report.indices if report.part is None else report.part
    if report.part is not None and isinstance(settings.get("select"), TopLoss):
        seen = range(12)  # the total is that of the whole batch
    i = np.array([int(n) for n in seen])
    rows = X[i], dict.fromkeys(y, Y[i]), sample_weight[i]
    expected = model.test_on_batch(*rows, return_dict=True)
    names = ("loss", "a_loss", "b_loss") if len(i) < 12 else ("loss",)
    for name in names:
        np.testing.assert_allclose(float(logs[name]), float(expected[name]), rtol=1e-4)
