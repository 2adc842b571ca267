"""Unusual models that plain Keras trains: ESAM trains them too, or raises an error."""

import threading
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.odd import X, Y, esam
from tests.keras.scene import close, cross_entropy, data, mlp, same, trainable

from esam_core import ESAMRuntimeError, ESAMTypeError, ESAMValueError, NonFiniteError
from esam_keras import ESAM, Bernoulli, Everything, Suffix

BACKEND = keras.backend.backend()


def fit(model, optimizer, loss=None, **options):
    model.compile(optimizer, cross_entropy() if loss is None else loss, **options)
    return model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)


class UnusedLayer(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(3)
        self.unused = keras.layers.Dense(7)

    def call(self, x):
        return self.head(x)


class OwnLoss(UnusedLayer):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        own = super().compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
        )
        return own + 0.01 * ops.mean(ops.square(self.head.kernel))


@pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer:UserWarning")
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@pytest.mark.parametrize("make", [UnusedLayer, OwnLoss])
def test_a_layer_that_is_not_called(make):
    keras.utils.set_random_seed(0)
    model = make()
    history = fit(model, esam(beta=1.0, gamma=0.5)).history
    assert history["sharpness"][-1] > 0.0


def test_compute_loss_set_on_the_instance():
    keras.utils.set_random_seed(0)
    model = mlp()

    def own(x, y, y_pred, sample_weight, training):  # noqa: ARG001  # as Keras calls it
        each = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        return ops.mean(each if sample_weight is None else each * sample_weight)

    model.compute_loss = own
    fit(model, esam(beta=1.0, gamma=1.0))


def test_a_custom_train_function_is_refused():
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            return super().make_train_function(force)

    with pytest.raises(ESAMTypeError, match="make_train_function"):
        Own([keras.layers.Dense(3)]).compile(esam(), cross_entropy())


def test_a_metric_with_the_name_of_a_log_is_refused():
    metric = keras.metrics.SparseCategoricalAccuracy(name="sharpness")
    with pytest.raises(ESAMValueError, match="must not be called 'sharpness'"):
        fit(mlp(), esam(beta=1.0, gamma=0.5), metrics=[metric])


def test_layers_of_several_widths():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, dtype="float32"),
            keras.layers.Dense(3, dtype="float64" if BACKEND != "jax" else "float32"),
        ]
    )
    assert fit(model, esam(beta=1.0, gamma=0.5)).history["sharpness"][-1] > 0.0


@pytest.mark.backends("tensorflow")
def test_a_call_compiled_by_tf_function_is_refused():
    import tensorflow as tf

    class Traced(keras.layers.Dense):
        @tf.function
        def call(self, x):
            return super().call(x)

    model = keras.Sequential([keras.Input((6,)), Traced(8, name="traced"), keras.layers.Dense(3)])
    with pytest.raises(ESAMRuntimeError, match=r"(?s)tf\.function.*traced/(kernel|bias)"):
        fit(model, esam())


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "settings",
    [
        {"perturb": Everything(), "gamma": 1.0},
        {"perturb": Everything(), "gamma": 0.5},
        {"beta": 0.5, "gamma": 0.5},
        {"perturb": Suffix("last"), "gamma": 1.0},
    ],
    ids=str,
)
def test_checkpointed_parts_run_again_at_the_same_weights(settings):
    from torch.utils.checkpoint import checkpoint

    class Hidden(keras.layers.Layer):
        def __init__(self, saves, **kwargs):
            super().__init__(**kwargs)
            self.first = keras.layers.Dense(8, activation="tanh")
            self.second = keras.layers.Dense(8, activation="tanh")
            self.saves = saves

        def inside(self, x):
            return self.second(self.first(x))

        def call(self, x):
            return checkpoint(self.inside, x, use_reentrant=False) if self.saves else self.inside(x)

    def weights(saves):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((6,)), Hidden(saves), Hidden(saves), keras.layers.Dense(3, name="last")]
        )
        fit(model, esam(**{"rho": 0.5, **settings}))
        return trainable(model)

    close(weights(True), weights(False), rtol=1e-6, atol=1e-7)


class TrainsAnother(keras.layers.Layer):
    """Returns its input; each call runs `step` first."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def call(self, x):
        if not isinstance(x, keras.KerasTensor):
            self.step()
        return x


@pytest.mark.backends("tensorflow", "torch")  # JAX traces each pass
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_inside_a_pass_of_another(fails):
    """Each step has its own noise, and its own copies of what Keras does not know."""
    inner = mlp()
    inner.compile(
        esam(on_nonfinite="raise", beta=1.0, gamma=0.5), cross_entropy(), run_eagerly=True
    )
    inner.train_on_batch(X, Y)

    def step():
        x = X * np.float32("nan") if fails else X
        with pytest.raises(NonFiniteError) if fails else nullcontext():
            inner.train_on_batch(x, Y)

    def weights(step):
        keras.utils.set_random_seed(0)
        dropout = keras.layers.Dropout(0.5), keras.layers.Dropout(0.5)
        parts = [dropout[0], TrainsAnother(step), dropout[1]]
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(8), *parts, keras.layers.Dense(3)]
        )
        fit(model, esam(beta=1.0, gamma=0.5), run_eagerly=True)
        return trainable(model)

    same(weights(step), weights(lambda: None))


@pytest.mark.backends("torch")
def test_two_threads_train_one_model_each():
    errors = []

    def train(seed):
        try:
            model = mlp()
            fit(model, esam(beta=1.0, gamma=0.5, seed=seed))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.backends("tensorflow", "torch")
def test_a_distribution_that_keras_ignores_is_refused(monkeypatch):
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "DataParallel")
    with pytest.raises(ESAMRuntimeError, match="only on the JAX backend"):
        mlp().compile(esam(), cross_entropy())


def history_of(optimizer):
    keras.utils.set_random_seed(0)
    x = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(x)
    model = keras.Model(
        x,
        {
            "c": keras.layers.Dense(3, name="c")(hidden),
            "r": keras.layers.Dense(1, name="r")(hidden),
        },
    )
    model.compile(
        optimizer,
        {"c": cross_entropy(), "r": "mse"},
        loss_weights={"c": 1.0, "r": 0.3},
        metrics={"c": ["accuracy"], "r": ["mae"]},
        weighted_metrics={"c": ["accuracy"], "r": ["mae"]},
    )
    # On TensorFlow Keras weights the outputs' losses depending on whether the batch size was known.
    n = 16 if BACKEND == "tensorflow" else 20
    weight = np.linspace(0.1, 2.0, n)
    targets = {"c": Y[:n], "r": X[:n, :1]}
    history = model.fit(
        X[:n],
        targets,
        sample_weight={"c": weight, "r": weight[::-1]},
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    return history.history, trainable(model)


def test_without_perturbation_the_history_equals_the_base_optimizers():
    base, weights = history_of(keras.optimizers.SGD(0.1))
    ours, same = history_of(ESAM(keras.optimizers.SGD(0.1), rho=0.0, logs=False))
    close(same, weights, rtol=1e-5, atol=1e-6)
    assert ours.keys() == base.keys()
    assert any("weighted" in name for name in base)
    for name, values in base.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-5, err_msg=name)


def test_a_layer_with_keras_trainer_as_a_mixin():
    """It has no `layers`, unlike a `keras.Model`, but its sublayers are still its blocks."""
    trainer = next(c for c in keras.Model.__mro__ if c.__name__.endswith("Trainer"))

    class Trained(trainer, keras.layers.Layer):
        def __init__(self):
            keras.layers.Layer.__init__(self)
            trainer.__init__(self)
            self.first = keras.layers.Dense(8, activation="tanh", name="first")
            self.head = keras.layers.Dense(3, name="head")

        def call(self, x):
            return self.head(self.first(x))

    def trained(optimizer):
        keras.utils.set_random_seed(0)
        model = Trained()
        model.compile(optimizer, cross_entropy())
        model.fit(*data(16), batch_size=8, verbose=0, shuffle=False)
        return model

    report = trained(ESAM("sgd", rho=0.5, perturb=Suffix("head"))).optimizer.report
    assert len(report.perturbed) == 2
    assert all("head" in name for name in report.perturbed)
    same(trained(ESAM("sgd", rho=0.0)).get_weights(), trained("sgd").get_weights())


def test_a_loss_that_returns_a_number():
    """It has no losses per sample, and needs none with gamma=1."""

    class Penalised(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(x * x))
            return x

    def trained(optimizer):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), Penalised()])
        model.compile(optimizer, loss=lambda y, y_pred: 0)
        model.fit(*data(16), batch_size=8, verbose=0, shuffle=False)
        return model.get_weights()

    same(trained(ESAM("sgd", rho=0.0, gamma=1.0)), trained("sgd"))
    with pytest.raises(ESAMValueError, match="must have a value for each sample"):
        trained(ESAM("sgd"))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_layer_that_writes_to_its_input(gamma):
    """On torch RandomBrightness does, but all passes of a step read the same images."""

    class Brightness(keras.layers.Layer):
        def __init__(self, copies):
            super().__init__()
            self.layer = keras.layers.RandomBrightness(0.9, value_range=(0, 1), seed=1)
            self.copies = copies

        def call(self, x):
            return self.layer(x * 1.0 if self.copies else x)

    def trained(copies):
        keras.utils.set_random_seed(0)
        layers = [Brightness(copies), keras.layers.Flatten(), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((4, 4, 3)), *layers])
        model.compile(esam(rho=0.5, gamma=gamma, perturb=Everything()), cross_entropy())
        x = np.random.default_rng(0).uniform(size=(16, 4, 4, 3)).astype("float32")
        model.fit(x, np.arange(16) % 3, batch_size=8, shuffle=False, verbose=0)
        return model.get_weights()

    close(trained(False), trained(True), rtol=1e-5, atol=1e-6)


@pytest.mark.backends("tensorflow")
def test_optional_inputs_missing_in_a_generator():
    def trained(optimizer):
        keras.utils.set_random_seed(0)
        x, other = keras.Input((6,), name="x"), keras.Input((6,), name="other", optional=True)

        class Sum(keras.layers.Layer):
            def call(self, x, other=None):
                return x if other is None else x + other

        model = keras.Model({"x": x, "other": other}, keras.layers.Dense(3)(Sum()(x, other)))
        model.compile(optimizer, cross_entropy())
        inputs, targets = data(8)
        batches = (({"x": inputs, "other": None}, targets) for _ in range(3))
        model.fit(batches, steps_per_epoch=2, verbose=0, shuffle=False)
        return model.get_weights()

    try:
        plain = trained("sgd")
    except ValueError as error:
        pytest.skip(f"this version of Keras does not accept None from a generator: {error}")
    same(trained(ESAM("sgd", rho=0.0)), plain)


class Reading(keras.Model):
    """A model that reads its values on the host while `reads` is set, as a summary does."""

    reads = False

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(3)

    def call(self, x):
        if self.reads:
            assert np.isfinite(ops.convert_to_numpy(x)).all()
        return self.head(x)


class Switch(keras.callbacks.Callback):
    """Lets a model read its values during training; before, Keras builds it symbolically."""

    def on_train_begin(self, logs=None):
        self.model.reads = True


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_an_eager_model_may_read_its_values(gamma):
    keras.utils.set_random_seed(0)
    model = Reading()
    options = {"metrics": ["accuracy"], "run_eagerly": True, "jit_compile": False}
    model.compile(esam(gamma=gamma), cross_entropy(), **options)
    logs = model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[Switch()]).history
    assert logs["loss"][2] < logs["loss"][0]


@pytest.mark.parametrize(
    "perturb",
    [Everything(), Bernoulli(0.9, unit="weight"), Bernoulli(0.01, unit="weight")],
    ids=str,
)
def test_a_zero_gradient_with_a_negligible_norm_eps(perturb):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, kernel_initializer="zeros")])
    optimizer = esam(norm_eps=1e-50, perturb=perturb, gamma=1.0)
    model.compile(optimizer, "mse")
    model.train_on_batch(X, np.zeros((20, 3), "float32"))
    assert float(optimizer.report.perturbation_norm) == 0.0
    assert not np.any(trainable(model)[0])
