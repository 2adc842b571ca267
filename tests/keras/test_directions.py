"""`ascend=`: parts, kept gradients and first moments, compared with Keras's own values."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.directed import X, Y, esam
from tests.keras.scene import Oracle, close, cross_entropy, mlp, rows, same, trainable, weights

from esam_core import ESAMValueError
from esam_core.directions import climbing_indices
from esam_keras import Momentum, Part, Previous, Proportional, Random, RandomSuffix, Suffix, TopLoss
from esam_keras.training import Training

BACKEND = keras.backend.backend()
optimizers = keras.optimizers


def fewer_on_jax(names, *on_jax):
    """Return some of the names on JAX, where compiling is slow, else all."""
    return [name for name in names if BACKEND != "jax" or name in on_jax]


def arrays(tensors):
    return [None if t is None else np.array(ops.convert_to_numpy(t)) for t in tensors]


def direction(model):
    optimizer = model.optimizer
    own = getattr(optimizer, "inner_optimizer", optimizer)
    return arrays(own.direction(model.trainable_variables))


# -- Part ------------------------------------------------------------------------------------------


def masked():
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(20, 4, mask_zero=True),
            keras.layers.SimpleRNN(4, return_sequences=True),
            keras.layers.Dense(3),
        ]
    )


def tokens():
    rng = np.random.default_rng(3)
    x = rng.integers(1, 20, (12, 5))
    x[np.arange(5)[None] > rng.integers(2, 6, (12, 1))] = 0
    return x, rng.integers(0, 3, (12, 5))


WEIGHTS = np.linspace(0.5, 2.0, 12).astype("float32")
LOSSES = {
    "mean": (mlp, cross_entropy, (X, Y)),
    "sum": (mlp, lambda: cross_entropy(reduction="sum"), (X, Y)),
    "by weight": (mlp, lambda: cross_entropy(reduction="mean_with_sample_weight"), (X, Y, WEIGHTS)),
    "masked": (masked, cross_entropy, tokens()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_part_is_perturbed_along_its_own_gradient(name):
    build, loss, batch = LOSSES[name]
    model = build()
    part = climbing_indices(Part(0.25), 12, seed=0, count=0)
    oracle = Oracle(model, {"loss": loss()}, batch)
    theta = trainable(model)
    g = oracle.gradient(theta, rows(batch, part))
    length = np.sqrt(sum(np.sum(np.square(a, dtype="float64")) for a in g))
    climbed = [a + 0.3 * b / length for a, b in zip(theta, g, strict=True)]
    expected = [a - 0.1 * b for a, b in zip(theta, oracle.gradient(climbed, batch), strict=True)]
    model.compile(esam(ascend=Part(0.25)), loss())
    model.train_on_batch(*batch)
    close(trainable(model), expected, rtol=1e-4, atol=1e-5)
    report = model.optimizer.report
    np.testing.assert_array_equal(np.array(report.part), part)
    assert len(report.losses) == 3 and report.sample_share == 1.0


@pytest.mark.parametrize("select", [TopLoss(0.5), Proportional(0.5, score="increase")], ids=repr)
def test_losses_of_a_part_and_of_the_rest_equal_those_of_the_batch(select):
    """The weights differ: a part alone would divide by a different sum of weights."""
    settings = {"loss": cross_entropy(reduction="mean_with_sample_weight")}
    seen = []
    for ascend in (Part(0.5), None):
        keras.utils.set_random_seed(1)
        model = mlp()
        model.compile(esam(gamma=None, select=select, ascend=ascend), **settings)
        logs = model.train_on_batch(X, Y, WEIGHTS, return_dict=True)
        seen.append((np.array(model.optimizer.report.losses), float(logs["loss"])))
    close([seen[0][0]], [seen[1][0]])
    np.testing.assert_allclose(seen[0][1], seen[1][1], rtol=1e-5)


def test_a_random_descent_has_the_same_scale_with_and_without_a_pass_at_theta():
    """The sum over half of the samples estimates the sum over all, for any ascent direction."""
    found = []
    for ascend in (Previous(), Part(0.5), None):
        keras.utils.set_random_seed(1)
        model = mlp()
        optimizer = esam(gamma=None, select=Random(0.5), ascend=ascend, rho=1e-12)
        model.compile(optimizer, cross_entropy(reduction="sum"))
        if ascend == Previous():
            theta = weights(model)
            model.train_on_batch(X, Y)
            model.set_weights(theta)
            optimizer.count.assign(0)
        model.train_on_batch(X, Y)
        found.append(trainable(model))
    close(found[0], found[2])
    close(found[1], found[2])


# -- Previous --------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Recorder(keras.optimizers.Optimizer):
    """SGD that records the gradient that its update rule receives."""

    def build(self, variables):
        super().build(variables)
        self.given = self.add_optimizer_variables(variables, "given")

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.given[self._get_variable_index(variable)], gradient)
        self.assign_sub(variable, gradient * ops.cast(learning_rate, gradient.dtype))


def recorder(**settings):
    return Recorder(learning_rate=0.1, **settings)


GIVEN = {
    "plain": recorder,
    "clipnorm": lambda: recorder(clipnorm=0.05),
    "clipvalue": lambda: recorder(clipvalue=0.01),
    "global_clipnorm": lambda: recorder(global_clipnorm=0.05),
    "accumulates": lambda: recorder(gradient_accumulation_steps=2, global_clipnorm=0.05),
    "scaled": lambda: recorder(loss_scale_factor=128.0),
    "loss scale": lambda: optimizers.LossScaleOptimizer(recorder(clipnorm=0.05)),
}


@pytest.mark.parametrize(
    "name", fewer_on_jax(GIVEN, "global_clipnorm", "accumulates", "loss scale")
)
def test_the_kept_gradient_is_that_of_the_update(name):
    base = GIVEN[name]()
    inner = getattr(base, "inner_optimizer", base)
    model = mlp()
    model.compile(esam(base, ascend=Previous(), rho=0.2), cross_entropy())
    changes = []
    for i in range(4):
        model.train_on_batch(np.roll(X, i, axis=1), Y)
        given = arrays(inner.given)
        same(direction(model), given)
        changes.append(sum(np.abs(g).sum() for g in given) > 0)
        assert (model.optimizer.report.perturbation_norm > 0) == (i > 0 and changes[i - 1])
    assert changes == [name != "accumulates", True, True, True]


def test_gradients_are_kept_only_for_units_that_can_be_perturbed():
    for perturb, norm, kept in (
        (Suffix("head"), "masked", 2),
        (RandomSuffix(("second", "head")), "masked", 4),
        (Suffix("head"), "full", 6),
        (None, "masked", 6),
    ):
        model = mlp()
        model.compile(esam(perturb=perturb, norm=norm, ascend=Previous()), cross_entropy())
        model.optimizer.build(model.trainable_variables)
        assert [g is not None for g in direction(model)] == [False] * (6 - kept) + [True] * kept
        own = [v.shape for v in model.optimizer.variables if "previous_gradient" in v.path]
        assert own == [v.shape for v in model.trainable_variables[-kept:]]


@pytest.mark.parametrize("where", ["around", "within"])
@pytest.mark.parametrize("ascend", [Previous(), Momentum()], ids=repr)
def test_there_is_no_direction_after_an_overflow(where, ascend):
    def scaler(inner):
        return optimizers.LossScaleOptimizer(inner, initial_scale=2.0**127)

    base = optimizers.SGD(0.1, momentum=0.9)
    own = esam(base if where == "around" else scaler(base), ascend=ascend)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = mlp()
        model.compile(scaler(own) if where == "around" else own, cross_entropy())
        before = weights(model)
        model.train_on_batch(X, Y)
        model.train_on_batch(X, Y)
        same(weights(model), before)
        assert not own.report.perturbed
        assert not any(np.any(g) for g in direction(model))
        scale = model.optimizer if where == "around" else own.base_optimizer
        scale.dynamic_scale.assign(8.0)
        model.train_on_batch(X, Y)
        assert not own.report.perturbed
        model.train_on_batch(X, Y)
        assert own.report.perturbed
        np.testing.assert_allclose(float(own.report.perturbation_norm), 0.3, rtol=1e-3)
        assert 0.0 < float(own.report.gradient_norm) < 10.0  # of the loss without the scale
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_reset_state_has_no_direction():
    for ascend in (Previous(), Momentum()):
        model = mlp()
        model.compile(esam(optimizers.SGD(0.1, momentum=0.9), ascend=ascend), cross_entropy())
        model.optimizer.build(model.trainable_variables)
        start = [np.array(v.value) for v in model.optimizer.variables]
        model.fit(X, Y, epochs=2, verbose=0)
        assert model.optimizer.report.perturbed
        model.optimizer.set_weights(start)
        model.train_on_batch(X, Y)
        assert not model.optimizer.report.perturbed


# -- Momentum --------------------------------------------------------------------------------------

#: Bases with a first moment, and its share in the first gradient.
BASES = {
    "sgd": (lambda: optimizers.SGD(0.05, momentum=0.9), 1.0),
    "nesterov": (lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True), 1.0),
    "schedule": (
        lambda: optimizers.SGD(
            optimizers.schedules.PiecewiseConstantDecay([5], [0.05, 0.01]), momentum=0.9
        ),
        1.0,
    ),
    "adam": (lambda: optimizers.Adam(0.01), 0.1),
    "adamw": (lambda: optimizers.AdamW(0.01), 0.1),
    "adamax": (lambda: optimizers.Adamax(0.01), 0.1),
    "nadam": (lambda: optimizers.Nadam(0.01), 0.1),
    "lamb": (lambda: optimizers.Lamb(0.01), 0.1),
    "lion": (lambda: optimizers.Lion(0.01, beta_2=0.9), 0.1),
    "scaled": (lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01)), 0.1),
    "muon": (lambda: optimizers.Muon(0.01), None),  # SGD's moment for matrices, Adam's for the rest
}


@pytest.mark.parametrize("name", fewer_on_jax(BASES, "schedule", "adam", "scaled", "muon"))
def test_the_first_moment_is_along_the_gradient(name):
    build, share = BASES[name]
    model = mlp()
    gradient = Oracle(model, {"loss": cross_entropy()}, (X, Y)).gradient(trainable(model), (X, Y))
    moment = [(share or (1.0 if g.ndim == 2 else 0.1)) * g for g in gradient]
    model.compile(esam(build(), ascend=Momentum(1)), cross_entropy())
    if name == "muon" and not hasattr(optimizers, "MultiOptimizer"):  # a different moment then
        with pytest.raises(ESAMValueError, match="Received: Muon of Keras"):
            model.train_on_batch(X, Y)
        return
    model.train_on_batch(X, Y)
    close(direction(model), moment, rtol=1e-4, atol=1e-6)
    assert not any("previous" in v.path for v in model.optimizer.variables)
    model.train_on_batch(X, Y)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in moment))
    np.testing.assert_allclose(float(model.optimizer.report.gradient_norm), length, rtol=1e-4)


def test_a_first_update_without_a_learning_rate_is_harmless():
    model = mlp()
    base = optimizers.SGD(0.0, momentum=0.9)
    model.compile(esam(base, ascend=Momentum()), cross_entropy())
    model.fit(X, Y, batch_size=4, verbose=0)
    assert all(np.isfinite(w).all() for w in weights(model))
    assert float(model.optimizer.report.perturbation_norm) == 0.0


@pytest.mark.skipif(not hasattr(optimizers, "MultiOptimizer"), reason="this Keras has none")
@pytest.mark.parametrize("ascend", [Previous(), Momentum(1)], ids=repr)
def test_several_base_optimizers(ascend):
    model = mlp()
    gradient = Oracle(model, {"loss": cross_entropy()}, (X, Y)).gradient(trainable(model), (X, Y))
    parts = optimizers.OptimizerMap(
        optimizers.Adam(0.01, clipvalue=1e-3), {".*head/.*": optimizers.SGD(0.1, momentum=0.9)}
    )
    model.compile(esam(optimizers.MultiOptimizer(parts), ascend=ascend), cross_entropy())
    model.train_on_batch(X, Y)
    share = 0.1 if ascend == Momentum(1) else 1.0
    clipped = [share * np.clip(g, -1e-3, 1e-3) for g in gradient[:4]]
    close(direction(model), [*clipped, *gradient[4:]], rtol=1e-4, atol=1e-6)
    model.train_on_batch(X, Y)
    assert model.optimizer.report.perturbation_norm > 0


WITHOUT = {
    "SGD with momentum=0": lambda: optimizers.SGD(0.1),
    "RMSprop": lambda: optimizers.RMSprop(0.1, momentum=0.9),
    "Adagrad": optimizers.Adagrad,
    "Adadelta": optimizers.Adadelta,
    "Adafactor": optimizers.Adafactor,
    "Ftrl": optimizers.Ftrl,
    "Recorder": recorder,
    "SGD with momentum=0 ": lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1)),
}
if hasattr(optimizers, "ScheduleFreeAdamW"):  # its "momentum" averages weights
    WITHOUT["ScheduleFreeAdamW"] = optimizers.ScheduleFreeAdamW


@pytest.mark.parametrize("name", WITHOUT)
def test_a_base_without_a_first_moment_is_refused_by_name(name):
    with pytest.raises(ESAMValueError, match=rf"`ascend=Momentum\(\)`.*Received: {name.strip()}"):
        esam(WITHOUT[name](), ascend=Momentum())


# -- states ----------------------------------------------------------------------------------------


def test_a_state_without_a_direction_starts_with_a_base_step():
    model = mlp()
    model.compile(esam(), cross_entropy())
    model.fit(X, Y, batch_size=4, verbose=0)
    store = {}
    model.optimizer.save_own_variables(store)
    other = mlp()
    other.compile(esam(ascend=Previous()), cross_entropy())
    other.optimizer.build(other.trainable_variables)
    other.optimizer.load_own_variables(store)
    assert int(other.optimizer.count.numpy()) == 3
    other.train_on_batch(X, Y)
    assert not other.optimizer.report.perturbed
    other.train_on_batch(X, Y)
    assert other.optimizer.report.perturbed


def test_gradients_are_also_kept_without_a_model():
    """An optimizer built before `compile` keeps the gradients of all variables."""
    model = mlp()
    optimizer = esam(perturb=Suffix("head"), ascend=Previous())
    optimizer.build(model.trainable_variables)
    assert sum("previous_gradient" in v.path for v in optimizer.variables) == 6
    model.compile(optimizer, cross_entropy())
    model.fit(X, Y, batch_size=4, verbose=0)
    assert Training.of(model).find_kept(model.trainable_variables) == [False] * 4 + [True] * 2
    assert len(optimizer.report.perturbed) == 2
