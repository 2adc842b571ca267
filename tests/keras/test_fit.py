"""Standard features of `fit`: modes, callbacks and kinds of input."""

import keras
import numpy as np
import pytest
from tests.keras.scene import close, cross_entropy, data, mlp, same, trainable, weights

from esam_core import ESAMRuntimeError, ESAMValueError
from esam_keras import ESAM, Suffix

X, Y = data(20)
BACKEND = keras.backend.backend()


def esam(**kwargs):
    return ESAM(keras.optimizers.SGD(0.1, momentum=0.9), **{"rho": 0.2, "beta": 0.5, **kwargs})


def fitted(settings=None, callbacks=(), model=None, **kwargs):
    keras.utils.set_random_seed(2)
    model = model or mlp()
    model.compile(esam(), cross_entropy(), **(settings or {}))
    kwargs = {"batch_size": 4, "epochs": 2, "shuffle": False, **kwargs}
    model.fit(X, Y, verbose=0, callbacks=list(callbacks), **kwargs)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"run_eagerly": True},
        {"jit_compile": True},
        {"jit_compile": False},
        pytest.param({"steps_per_execution": 3}, marks=pytest.mark.backends("tensorflow", "jax")),
    ],
    ids=["eager", "jit", "no jit", "three steps at once"],
)
def test_every_mode_runs_the_same_steps(settings):
    plain, other = fitted(), fitted(settings)
    close(trainable(other), trainable(plain), rtol=1e-4, atol=1e-5)
    assert int(other.optimizer.count.numpy()) == 10


@pytest.mark.backends("torch")
def test_steps_per_execution_is_refused_as_by_keras():
    with pytest.raises(ValueError, match="`steps_per_execution` must be 1"):
        fitted({"steps_per_execution": 3})


@pytest.mark.backends("tensorflow", "jax")
def test_callbacks_are_called_every_n_steps():
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(batch)
    )
    fitted({"steps_per_execution": 2}, [watch], epochs=1)
    plain = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: plain.append(batch)
    )
    model = mlp()
    model.compile("sgd", cross_entropy(), steps_per_execution=2)
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[watch])
    assert seen == plain


def test_train_on_batch_runs_the_same_steps_as_fit():
    model = fitted(epochs=1)
    keras.utils.set_random_seed(2)
    other = mlp()
    other.compile(esam(), cross_entropy())
    for i in range(0, 20, 4):
        other.train_on_batch(X[i : i + 4], Y[i : i + 4])
    close(trainable(other), trainable(model))


def test_learning_rate_scheduler():
    rates = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 * rate)
    model = fitted(callbacks=[rates], epochs=3)
    assert float(model.optimizer.base_optimizer.learning_rate) == pytest.approx(0.1 / 8)
    with pytest.raises(AssertionError):
        same(trainable(model), trainable(fitted(epochs=3)))


def test_reduce_on_plateau_and_early_stopping():
    reduce = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=10.0)
    stop = keras.callbacks.EarlyStopping(
        monitor="loss", patience=3, min_delta=10.0, restore_best_weights=True
    )
    model = fitted(callbacks=[reduce, stop], epochs=10)
    assert float(model.optimizer.learning_rate) < 0.1
    assert int(model.optimizer.count.numpy()) == 5 * 4


def test_swapping_in_averaged_weights():
    keras.utils.set_random_seed(2)
    model = mlp()
    base = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    model.compile(ESAM(base), cross_entropy())
    swap = keras.callbacks.SwapEMAWeights()
    model.fit(X, Y, validation_data=(X, Y), epochs=2, verbose=0, callbacks=[swap])
    average = [np.array(v.value) for v in base._model_variables_moving_average]
    close(trainable(model), average)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has none")
@pytest.mark.parametrize("scaled", [False, True])
def test_callbacks_find_the_parts_of_a_multi_optimizer(scaled):
    optimizers = keras.optimizers
    keras.utils.set_random_seed(2)
    model = mlp()
    averaged = optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    plain = optimizers.SGD(0.2)
    base = optimizers.MultiOptimizer(optimizers.OptimizerMap(plain, {".*head/.*": averaged}))
    model.compile(ESAM(optimizers.LossScaleOptimizer(base) if scaled else base), cross_entropy())
    reduce = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=10.0)
    swap = keras.callbacks.SwapEMAWeights()
    model.fit(X, Y, validation_data=(X, Y), epochs=3, verbose=0, callbacks=[reduce, swap])
    assert float(plain.learning_rate) < 0.2
    average = [np.array(v.value) for v in averaged._model_variables_moving_average]
    close(trainable(model)[-2:], average)
    assert not hasattr(ESAM("sgd"), "optimizers")


def test_model_checkpoint_saves_a_trainable_model(tmp_path):
    path = tmp_path / "{epoch}.keras"
    save = keras.callbacks.ModelCheckpoint(str(path))
    model = fitted(callbacks=[save], epochs=2)
    loaded = keras.saving.load_model(str(path).format(epoch=1))
    loaded.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    close(trainable(loaded), trainable(model))
    assert int(loaded.optimizer.count.numpy()) == 10


def test_backup_and_restore_resumes_where_it_was_interrupted(tmp_path):
    class Cut(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    whole = fitted(epochs=4)
    backup = str(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fitted(callbacks=[keras.callbacks.BackupAndRestore(backup), Cut()], epochs=4)
    again = fitted(callbacks=[keras.callbacks.BackupAndRestore(backup)], epochs=4)
    close(trainable(again), trainable(whole))
    assert int(again.optimizer.count.numpy()) == 20


@pytest.mark.backends("tensorflow")
def test_tensorboard_gets_the_sharpness(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted(callbacks=[keras.callbacks.TensorBoard(str(tmp_path))])
    events = EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    assert {"epoch_loss", "epoch_sharpness", "epoch_sample_share"} <= set(events.Tags()["tensors"])


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def tf_data():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def torch_loader():
    torch = pytest.importorskip("torch")
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(pairs, batch_size=4)


def generator():
    for i in range(5):
        yield X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


INPUTS = {
    "PyDataset": Batches,
    "tf.data": tf_data,
    "DataLoader": torch_loader,
    "generator": generator,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_kinds_of_input(kind):
    if (kind == "tf.data" and BACKEND == "torch") or (kind == "DataLoader" and BACKEND != "torch"):
        pytest.skip("a second framework in one process")
    expected = fitted(epochs=1)
    keras.utils.set_random_seed(2)
    model = mlp()
    model.compile(esam(), cross_entropy())
    model.fit(INPUTS[kind](), verbose=0, steps_per_epoch=5, shuffle=False)
    close(trainable(model), trainable(expected))


def test_several_inputs():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    hidden = keras.layers.concatenate([keras.layers.Dense(4)(a), keras.layers.Dense(4)(b)])
    model = keras.Model({"a": a, "b": b}, keras.layers.Dense(3)(hidden))
    model.compile(esam(gamma=0.3), cross_entropy())
    model.fit({"a": X, "b": X[::-1]}, Y, batch_size=5, verbose=0)
    assert int(model.optimizer.count.numpy()) == 4
    assert len(model.optimizer.report.indices) == 2


def test_a_model_that_is_built_by_its_data():
    model = keras.Sequential([keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)])
    model.compile(esam(), cross_entropy(), metrics=["accuracy"])
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    assert int(model.optimizer.count.numpy()) == 10


def test_an_unknown_block_is_refused_before_a_weight_changes():
    model = mlp()
    model.compile(ESAM("sgd", perturb=Suffix("third")), cross_entropy())
    before = weights(model)
    with pytest.raises(ESAMValueError, match="one of 'first', 'second', 'head'"):
        model.fit(X, Y, verbose=0)
    same(weights(model), before)


def test_an_empty_batch_is_refused():
    model = mlp()
    model.compile(esam(), cross_entropy())
    with pytest.raises(ESAMValueError, match="must not be empty"):
        model.train_on_batch(X[:0], Y[:0])


def test_an_interrupted_step_leaves_the_weights():
    class Stops(keras.layers.Layer):
        def call(self, x):
            if stopping:
                raise KeyboardInterrupt
            return x

    stopping = False
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), Stops()])
    model.compile(esam(), cross_entropy(), run_eagerly=True)
    model.fit(X, Y, verbose=0)
    before = weights(model)
    stopping = True
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, verbose=0)
    same(weights(model), before)
    assert int(model.optimizer.count.numpy()) == 1
    stopping = False
    model.fit(X, Y, verbose=0)


def test_a_layer_frozen_after_compiling_takes_effect_with_the_next_compile():
    model = fitted(epochs=1)
    model.layers[0].trainable = False
    model.compile(esam(), cross_entropy())
    before = weights(model)[:2]
    model.fit(X, Y, verbose=0)
    same(weights(model)[:2], before)


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_a_layer_unfrozen_after_compiling_is_refused(how):
    """Plain Keras does so too, except in a function that it has compiled before."""
    model = mlp()
    model.layers[0].trainable = False
    model.compile(ESAM("sgd"), cross_entropy())
    model.train_on_batch(X, Y)
    model.layers[0].trainable = True
    before = weights(model)
    for _ in range(2):
        with pytest.raises(ESAMRuntimeError, match=r"compiled again.*first/kernel"):
            getattr(model, how)(X, Y)
    same(weights(model), before)
    model.compile(ESAM("sgd"), cross_entropy())
    getattr(model, how)(X, Y)
    assert all(np.any(a != b) for a, b in zip(weights(model), before, strict=True))


def test_a_base_optimizer_that_does_not_know_an_unfrozen_layer_is_refused():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, name="first")])
    model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.Dense(3))
    model.layers[0].trainable = False
    model.compile(ESAM("sgd"), cross_entropy())
    model.train_on_batch(X, Y)
    model.layers[0].trainable = True
    model.compile(ESAM(model.optimizer.base_optimizer), cross_entropy())
    before = weights(model)
    with pytest.raises(ESAMRuntimeError, match=r"and base optimizer.*first/kernel"):
        model.train_on_batch(X, Y)
    same(weights(model), before)
