"""`compile` with an ESAM gives a model instance our step; with others, its own step back."""

import types

import keras
import numpy as np
import pytest
from tests.keras.scene import cross_entropy, data, mlp, same, weights

import esam_keras
from esam_core import ESAMRuntimeError, ESAMTypeError, ESAMValueError
from esam_keras import ESAM, Bernoulli

BACKEND = keras.backend.backend()


def subclassed(base=keras.Model, **methods):
    """Return a subclassed model with these methods."""

    def init(self):
        base.__init__(self)
        self.first = keras.layers.Dense(8, activation="relu")
        self.head = keras.layers.Dense(3)

    def call(self, x):
        return self.head(self.first(x))

    return type("Mine", (base,), {"__init__": init, "call": call, **methods})


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_any_plain_model_trains(kind, run_eagerly):
    if kind == "sequential":
        model = mlp()
    elif kind == "functional":
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(8, activation="relu")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.add([hidden, hidden])))
    else:
        model = subclassed()()
    model.compile(ESAM(keras.optimizers.SGD(0.1)), cross_entropy(), run_eagerly=run_eagerly)
    history = model.fit(*data(), batch_size=4, epochs=3, verbose=0, shuffle=False).history
    assert history["loss"][-1] < history["loss"][0]
    assert int(model.optimizer.count.numpy()) == 9
    assert model.optimizer.report.count == 8


def test_it_is_the_class_that_defines_compile_that_is_wrapped():
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    assert "compile" not in vars(keras.Model)
    assert hasattr(vars(owner)["compile"], "esam_keras_original")
    # Keras compares this function before it compiles a loaded model again.
    from keras.src.trainers.trainer import Trainer

    assert keras.Model.compile is Trainer.compile


def test_installing_twice_wraps_once():
    before = keras.Model.compile
    esam_keras.install()
    assert keras.Model.compile is before


def test_recompiling_gives_the_model_its_own_step_back():
    model = mlp()
    own = model.make_train_function.__func__
    model.compile(ESAM(keras.optimizers.SGD(0.1)), cross_entropy())
    assert not hasattr(model.make_train_function, "__func__")
    model.fit(*data(), verbose=0)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    assert model.make_train_function.__func__ == own
    assert not any("esam" in name for name in vars(model))
    history = model.fit(*data(), verbose=0).history
    assert list(history) == ["loss"]


def test_a_model_without_esam_is_not_touched():
    model = mlp()
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    assert not {"train_step", "make_train_function", "train_on_batch"} & set(vars(model))


def test_train_on_batch_may_be_overridden():
    """With its own arguments, as in KerasHub's tasks; or with results of its own."""
    x, y = data()

    class Passing(keras.Sequential):
        def train_on_batch(self, x, **options):
            return super().train_on_batch(x, y, **options)

    class Own(keras.Sequential):
        def train_on_batch(self, x):
            super().train_on_batch(x, y)
            return "trained"

    for cls in (Passing, Own):
        model = cls(mlp().layers)
        model.compile(ESAM("sgd", gamma=0.5), cross_entropy(), metrics=["accuracy"])
        found = model.train_on_batch(x)
        if cls is Own:
            assert found == "trained"
        else:
            assert len(found) == 2
            assert "sharpness" in model.train_on_batch(x, return_dict=True)
        assert int(model.optimizer.count.numpy()) == 1 + (cls is Passing)


def test_compiled_steps_have_different_masks():
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self.model.optimizer.report)

    model = mlp()
    model.compile(ESAM(keras.optimizers.SGD(0.0), beta=0.5, seed=3), cross_entropy())
    model.fit(*data(8), batch_size=8, epochs=12, verbose=0, callbacks=[Watch()])
    names = [v.path for v in model.trainable_variables]
    units = esam_keras.unit_records(model)
    for count, report in enumerate(seen):
        mask = Bernoulli(0.5).draw(units, seed=3, count=count)
        wanted = [name for name, m in zip(names, mask.perturbed, strict=True) if m]
        assert list(report.perturbed) == wanted
    # With lr = 0 every step has the same weights and batch: only the mask can differ. The norm of
    # the masked gradient shows what the compiled step did, not what was reported.
    norms = {round(float(r.gradient_norm), 6) for r in seen if r.gradient_norm is not None}
    masks = {r.perturbed for r in seen if r.perturbed}
    assert len(norms) == len(masks) > 5


class TestOwnTrainStep:
    """A model that overrides `train_step`."""

    def test_that_applies_gradients_gets_advice(self):
        def train_step(self, *arguments):
            if BACKEND == "jax":
                state, _ = arguments
                trainable, non_trainable, variables, metrics = state
                gradients = [np.zeros(v.shape, "float32") for v in trainable]
                trainable, variables = self.optimizer.stateless_apply(
                    variables, gradients, trainable
                )
                return {}, (trainable, non_trainable, variables, metrics)
            gradients = [keras.ops.zeros_like(v) for v in self.trainable_variables]
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {}

        model = subclassed(train_step=train_step)()
        model(data()[0])
        model.compile(ESAM(keras.optimizers.SGD(0.1)), cross_entropy())
        before = weights(model)
        with pytest.raises(ESAMRuntimeError, match=r"esam_keras\.train_step\(self, \.\.\.\)"):
            model.fit(*data(), verbose=0)
        same(weights(model), before)

    def test_may_call_ours(self):
        def train_step(self, *arguments):
            result = esam_keras.train_step(self, *arguments)
            logs = result[0] if BACKEND == "jax" else result
            logs["mine"] = keras.ops.ones(())
            return result

        plain, mine = subclassed()(), subclassed(train_step=train_step)()
        for model in (plain, mine):
            model(data()[0])
            model.compile(ESAM(keras.optimizers.SGD(0.1), beta=0.5), cross_entropy())
        mine.set_weights(plain.get_weights())
        plain.fit(*data(), batch_size=4, epochs=2, shuffle=False, verbose=0)
        history = mine.fit(*data(), batch_size=4, epochs=2, shuffle=False, verbose=0).history
        same(weights(mine), weights(plain))
        assert history["mine"] == [1.0, 1.0]
        assert int(mine.optimizer.count.numpy()) == 6

    def test_may_be_set_on_the_instance(self):
        def train_step(self, *arguments):
            result = esam_keras.train_step(self, *arguments)
            logs = result[0] if BACKEND == "jax" else result
            logs["mine"] = keras.ops.ones(())
            return result

        model = mlp()
        model.train_step = types.MethodType(train_step, model)
        model.compile(ESAM("sgd"), cross_entropy())
        assert model.fit(*data(), verbose=0).history["mine"] == [1.0]
        assert model.train_on_batch(*data(), return_dict=True)["mine"] == 1.0
        assert model.optimizer.report.count == 1


class TestOwnLoop:
    """`train_step` in the user's own loop."""

    def batches(self):
        x, y = data()
        return [
            (keras.ops.convert_to_tensor(x[i : i + 4]), keras.ops.convert_to_tensor(y[i : i + 4]))
            for i in range(0, 12, 4)
        ]

    def test_equals_fit(self):
        fitted, looped = mlp(), mlp()
        looped.set_weights(fitted.get_weights())
        for model in (fitted, looped):
            model.compile(ESAM(keras.optimizers.SGD(0.1), beta=0.5), cross_entropy())
        fitted.fit(*data(), batch_size=4, shuffle=False, verbose=0)
        looped.optimizer.build(looped.trainable_variables)
        if BACKEND == "jax":
            groups = (
                looped.trainable_variables,
                looped.non_trainable_variables,
                looped.optimizer.variables,
                looped.metrics_variables,
            )
            state = tuple([v.value for v in group] for group in groups)
            for batch in self.batches():
                logs, state = esam_keras.train_step(looped, state, batch)
            for group, values in zip(groups, state, strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value)
        else:
            for batch in self.batches():
                logs = esam_keras.train_step(looped, batch)
        for a, b in zip(weights(looped), weights(fitted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert set(logs) == {"loss", "sharpness", "sample_share"}

    def test_of_an_uncompiled_model_is_refused(self):
        model = mlp()
        with pytest.raises(ESAMRuntimeError, match="compiled with an ESAM first"):
            esam_keras.train_step(model, *self.batches()[:1])

    def test_with_other_arguments_is_refused(self):
        model = mlp()
        model.compile(ESAM("sgd"), cross_entropy())
        with pytest.raises(ESAMTypeError, match="Received: 3 arguments"):
            esam_keras.train_step(model, 1, 2, 3)

    @pytest.mark.backends("tensorflow")
    def test_in_a_custom_tf_function_is_refused(self):
        import tensorflow as tf

        model = mlp()
        model.compile(ESAM("sgd"), cross_entropy())
        with pytest.raises(ESAMRuntimeError, match="would repeat the first one forever"):
            tf.function(lambda b: esam_keras.train_step(model, b), autograph=False)(
                self.batches()[0]
            )

    @pytest.mark.backends("jax")
    def test_in_a_custom_jit_is_refused(self):
        import jax

        model = mlp()
        model.compile(ESAM("sgd"), cross_entropy())
        with pytest.raises(ESAMRuntimeError, match="would repeat the first one forever"):
            jax.jit(lambda s, batch: esam_keras.train_step(model, s, batch))(
                ([], [], [], []), self.batches()[0]
            )


def test_a_loop_that_only_applies_gradients_gets_advice():
    model = mlp()
    optimizer = ESAM(keras.optimizers.SGD(0.1))
    optimizer.build(model.trainable_variables)
    before = weights(model)
    gradients = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    with pytest.raises(ESAMRuntimeError, match="two passes"):
        optimizer.apply(gradients)
    with pytest.raises(ESAMRuntimeError, match="two passes"):
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    same(weights(model), before)


def test_no_loss_is_refused():
    with pytest.raises(ESAMValueError, match="`loss` must be given"):
        mlp().compile(optimizer=ESAM("sgd"))


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (keras.optimizers.SGD, ESAMTypeError, "not a class"),
        ("no_such_optimizer", ESAMValueError, "'no_such_optimizer'"),
        (ESAM("sgd"), ESAMTypeError, "another ESAM"),
        (
            keras.optimizers.LossScaleOptimizer(ESAM("sgd")),
            ESAMTypeError,
            "another ESAM",
        ),
        (None, ESAMTypeError, "base_optimizer=None"),
        (0.1, ESAMTypeError, r"base_optimizer=0\.1"),
    ],
)
def test_a_wrong_base_optimizer_is_refused(base, error, message):
    with pytest.raises(error, match=message):
        ESAM(base)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -1.0}, ESAMValueError, r"rho=-1\.0"),
        ({"gamma": 1.5}, ESAMValueError, r"`gamma` must be in \(0, 1\]. Received: gamma=1\.5"),
        ({"beta": 0.5, "perturb": Bernoulli(0.5)}, ESAMValueError, "pass only one of the two"),
        ({"gama": 0.5}, TypeError, "gama"),
        ({"logs": 1}, ESAMTypeError, "logs=1"),
    ],
)
def test_wrong_hyperparameters_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ESAM("sgd", **arguments)


def test_a_name_of_a_keras_optimizer_works():
    assert isinstance(ESAM("adam").base_optimizer, keras.optimizers.Adam)


@pytest.mark.backends("jax")
def test_nnx_mode_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "is_nnx_enabled", lambda: True, raising=False)
    with pytest.raises(ESAMRuntimeError, match="NNX"):
        mlp().compile(ESAM("sgd"), cross_entropy())


@pytest.mark.backends("tensorflow")
def test_mirrored_strategy_is_refused():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = mlp()
    with pytest.raises(ESAMRuntimeError, match="DataParallel"):
        model.compile(ESAM("sgd"), cross_entropy())


@pytest.mark.backends("tensorflow")  # on the others, Keras itself refuses such data
def test_targets_that_only_train_step_makes_are_refused():
    def train_step(self, data):
        (x,) = data
        return super(type(self), self).train_step((x, x[:, :3]))

    model = subclassed(train_step=train_step)()
    model.compile(ESAM("sgd"), "mse")
    with pytest.raises(ESAMValueError, match=r"`fit\(x, y\)`, or in your own `compute_loss`"):
        model.fit(data()[0], verbose=0)


@pytest.mark.backends("tensorflow")  # on the others, Keras itself refuses such data
def test_targets_whose_form_train_step_changes_are_refused():
    def train_step(self, data):
        x, y = data
        return super(type(self), self).train_step((x, keras.ops.one_hot(y, 3)))

    model = subclassed(train_step=train_step)()
    model.compile(ESAM("sgd"), keras.losses.CategoricalCrossentropy(from_logits=True))
    with pytest.raises(
        ESAMValueError, match=r"must have the form that the model and its loss need.*in the data"
    ):
        model.fit(*data(), verbose=0)


def trained_after(compile_again, *, fitted):
    """Return the logs of a model after a compile that may fail, and its ESAM."""
    keras.utils.set_random_seed(0)
    model, esam = mlp(), ESAM(keras.optimizers.SGD(0.1), beta=1.0)
    model.compile(esam, cross_entropy())
    if fitted:
        model.fit(*data(), batch_size=4, verbose=0, shuffle=False)
    compile_again(model)
    return model.fit(*data(), batch_size=4, verbose=0, shuffle=False).history, esam


@pytest.mark.parametrize("fitted", [False, True])
def test_a_failed_compile_changes_nothing(fitted):
    """As in Keras, where the old optimizer goes on."""

    def fail(model):
        with pytest.raises(ValueError, match="unknown"):
            model.compile("unknown", cross_entropy())

    found, _ = trained_after(fail, fitted=fitted)
    wanted, _ = trained_after(lambda _: None, fitted=fitted)
    assert found == wanted


@pytest.mark.parametrize("fitted", [False, True])
def test_a_compile_that_fails_after_it_has_set_another_optimizer(fitted):
    """Our step must not run with it."""

    def fail(model):
        with pytest.raises(ValueError, match="loss_weights"):
            model.compile(keras.optimizers.SGD(0.1), cross_entropy(), loss_weights="unknown")

    logs, esam = trained_after(fail, fitted=fitted)
    assert "sharpness" not in logs
    assert int(esam.count.numpy()) == (3 if fitted else 0)
