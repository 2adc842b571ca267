"""The private names of Keras that `esam_keras.compat` uses: each works as expected."""

import keras
import numpy as np
import pytest
from keras import ops
from tests.keras.scene import cross_entropy, data, mlp

from esam_keras import compat
from esam_keras.methods import replace_methods
from esam_keras.scope import PassScope

BACKEND = keras.backend.backend()
X, Y = data()


@pytest.fixture
def model():
    model = mlp()
    model.compile("sgd", cross_entropy(), metrics=["accuracy"])
    compat.build_from(model, (X, Y))
    return model


def test_a_pass_scope_has_values_and_keeps_assignments():
    known, other = (keras.Variable(n, trainable=False) for n in (1.0, 2.0))
    values = {id(known): ops.convert_to_tensor(3.0)}

    def doubled(variable, value):
        return value * 2.0 if variable is known else value

    with PassScope(values, doubled) as scope:
        assert float(known.value) == 3.0
        known.assign(5.0)
        other.assign(7.0)
        assert float(known.value) == 10.0
    assert [v is other for v in scope.strangers] == [True]
    assert float(scope.state_mapping[id(other)]) == 7.0
    assert (float(known.value), float(other.value)) == (1.0, 2.0)


def test_methods_are_replaced_and_restored(model):
    layer = model.layers[0]

    def stopped():
        with replace_methods([(layer, "call", lambda x: x * 0.0)]):
            assert not np.any(ops.convert_to_numpy(layer(X)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "call" not in vars(layer)
    assert np.any(ops.convert_to_numpy(layer(X)))


def test_an_own_method_comes_back(model):
    layer = model.layers[0]
    own = vars(layer)["call"] = lambda x: x * 2.0
    with replace_methods([(layer, "call", lambda x: x * 0.0)]):
        pass
    assert vars(layer)["call"] is own


def test_added_losses_are_kept():
    layer = keras.layers.Dense(3, activity_regularizer=lambda x: 1.0 + 0.0 * ops.sum(x))
    model = keras.Sequential([keras.Input((6,)), layer])
    with PassScope({}):
        model(X)
        with compat.added_losses_kept(model), PassScope({}):
            model(X)
        (loss,) = model.losses
        assert loss.shape == ()


def test_averages_inside_a_scaler():
    base = keras.optimizers.SGD(0.1, use_ema=True)
    base.build([keras.Variable(1.0)])
    scaler = keras.optimizers.LossScaleOptimizer(base)
    assert compat.ema_variables(scaler) is compat.ema_variables(base)


def test_masks_are_attached_to_tensors():
    outputs = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[0, 1]]))
    (mask,) = compat.masks_of(outputs)
    assert ops.convert_to_numpy(mask).tolist() == [[False, True]]
    (again,) = compat.masks_of(compat.with_masks(outputs * 1.0, [mask]))
    assert again is mask


def test_direct_layers(model):
    class WithLayers(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = keras.layers.Dense(3), mlp()

    assert compat.direct_layers(model) == model.layers
    layer = WithLayers()
    assert compat.direct_layers(layer) == [layer.first, layer.second]


def test_layers_and_their_variables(model):
    inner = keras.Sequential([keras.layers.Dense(3)])
    outer = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6), inner])
    found = compat.flat_layers(outer)
    assert inner in found and inner.layers[0] in found and outer in found
    direct = compat.sublayers(outer)
    assert inner in direct and outer not in direct and inner.layers[0] not in direct
    assert compat.static_shape(keras.KerasTensor((None, 3))) == [None, 3]
    assert [v.name for v in compat.own_trainable_variables(model.layers[0])] == ["kernel", "bias"]
    assert compat.own_trainable_variables(model) == []
    inputs, outputs = compat.inbound_tensors(model.layers[0])
    assert (inputs[0].shape, outputs[0].shape) == ((None, 6), (None, 8))
    assert compat.inbound_tensors(keras.layers.Dense(3)) is None


def test_arguments_and_shapes_of_models(model):
    assert compat.takes_training(model)
    assert compat.output_spec(model, keras.KerasTensor((5, 6))).shape == (5, 3)


def test_losses_and_metrics(model):
    assert compat.has_compiled_loss(model)
    (loss,) = compat.compiled_losses(model)
    assert isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
    y_pred = ops.stop_gradient(model(X))
    found = float(compat.total_loss(model, X, ops.convert_to_tensor(Y), y_pred, None))
    np.testing.assert_allclose(found, model.evaluate(X, Y, verbose=0)[0], rtol=1e-5)
    model.reset_metrics()
    compat.track_loss(model, ops.convert_to_tensor(3.0), 12)
    assert float(model.get_metrics_result()["loss"]) == 3.0
    assert compat.flat_metrics(model, {"loss": 1.0, "accuracy": 2.0}) == [1.0, 2.0]
    without = mlp()
    without.compile("sgd")
    assert not compat.has_compiled_loss(without)
    assert compat.compiled_losses(without) == []


def test_averages_of_an_optimizer(model):
    base = keras.optimizers.SGD(0.1, use_ema=True)
    base.build(model.trainable_variables)
    assert len(compat.ema_variables(base)) == len(model.trainable_variables)

    class Around(compat.BaseAverages):
        base_optimizer = base

    assert Around()._model_variables_moving_average is base._model_variables_moving_average


def test_variables_of_an_optimizer(model):
    base = keras.optimizers.SGD(0.1, momentum=0.9, clipvalue=0.5, gradient_accumulation_steps=2)
    variables = model.trainable_variables
    base.build(variables)
    assert compat.own_variables(base) == base.variables
    assert "iteration" in compat.own_variables(base)[0].path
    assert compat.known_variables(base) == variables
    other = keras.optimizers.SGD(0.1)
    compat.know_variables(other, variables)
    assert compat.known_variables(other) == variables
    assert not {id(v) for v in other.variables} & {id(v) for v in variables}
    so_far = compat.accumulated_gradients(base, variables[1:])
    assert [v.shape for v in so_far] == [v.shape for v in variables[1:]]
    assert all("gradient_accumulator" in v.path for v in so_far)
    (clipped,) = compat.clip_gradients(base, [ops.convert_to_tensor([1.0, -2.0, 0.25])])
    assert ops.convert_to_numpy(clipped).tolist() == [0.5, -0.5, 0.25]


@pytest.mark.parametrize("name", compat.MOMENTS)
def test_first_moments_of_an_optimizer(name, model):
    if not hasattr(keras.optimizers, name):
        pytest.skip("this Keras has none")
    settings = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(keras.optimizers, name)(0.1, **settings)
    variables = model.trainable_variables
    optimizer.build(variables)
    if not hasattr(optimizer, compat.moments_name(optimizer)):
        pytest.skip("Keras 3.11 keeps Muon's moments elsewhere, and ESAM refuses it by name")
    assert isinstance(getattr(optimizer, compat.moments_name(optimizer)), list)
    moments = [compat.first_moment(optimizer, v) for v in variables[::-1]]
    assert [m.shape for m in moments] == [v.shape for v in variables[::-1]]
    assert all("momentum" in m.path or m.path.endswith("_m") for m in moments)


def test_optimizers_without_first_moments(model):
    plain, other = keras.optimizers.SGD(0.1), keras.optimizers.RMSprop(0.1)
    for optimizer in (plain, other):
        optimizer.build(model.trainable_variables)
        assert compat.first_moment(optimizer, model.trainable_variables[0]) is None
    assert compat.moments_name(other) is None


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has none")
def test_several_optimizers(model):
    optimizers = keras.optimizers
    first, second = optimizers.SGD(0.1), optimizers.Adam()
    several = optimizers.MultiOptimizer(optimizers.OptimizerMap(first, {".*head/.*": second}))
    several.build(model.trainable_variables)
    found = [compat.optimizer_of(several, v) for v in model.trainable_variables]
    assert [f is second for f in found] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("mode", "found"),
    [("full", True), ("list_of_layers", True), ("activations", False), (None, False)],
)
def test_checkpointed_layers(mode, found):
    with keras.RematScope(mode=mode, layer_names=["listed"]):
        layers = [keras.layers.Dense(3, name=name) for name in ("listed", "other")]
    assert compat.is_checkpointed(layers[0]) == found
    assert compat.is_checkpointed(layers[1]) == (mode == "full")
    assert not compat.is_checkpointed(keras.layers.Dense(3))


def test_dense_tensors_are_not_sparse():
    assert not compat.is_sparse(ops.ones((3,)))
    assert not compat.is_sparse(None)


@pytest.mark.backends("tensorflow")
def test_private_names_of_tensorflow(model):
    import tensorflow as tf

    seen = []
    for spec in (tf.TensorSpec(None), tf.TensorSpec((None, 2))):
        tf.function(lambda x: seen.append(compat.static_shape(x))).get_concrete_function(spec)
    assert seen == [(), [None, 2]]
    assert compat.distribution_strategy(model) is None
    assert compat.is_sparse(tf.sparse.from_dense([[1.0, 0.0]]))
    assert isinstance(compat.reads_optionals(model), bool)
    variable = keras.Variable(2.0)
    given = []

    @tf.custom_gradient
    def doubled(x):
        compat.tell_read(variable)

        def gradient(upstream, variables):
            given.extend(variables)
            return upstream, [upstream for _ in variables]

        return x * 2.0, gradient

    x = tf.constant(1.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = doubled(x)
    assert [v is variable.value for v in tape.watched_variables()] == [True]
    tape.gradient(y, x)
    assert [v is variable.value for v in given] == [True]
    layer = model.layers[0]
    layer.own = tf.Variable(1.0)

    def holders(attributes):
        parts = {n: v.values() if isinstance(v, dict) else [v] for n, v in attributes.items()}
        return [name for name, held in parts.items() if any(v is layer.own for v in held)]

    assert len(holders(vars(layer))) > 1
    assert holders(compat.attributes(layer)) == ["own"]


@pytest.mark.backends("torch")
def test_private_names_of_torch(model):
    import torch

    variable = model.trainable_variables[0]
    with PassScope({id(variable): torch.zeros(6, 8)}):
        assert compat.torch_parameter(variable) is not variable.value
    assert compat.torch_parameter(variable) is variable.value
    assert compat.is_torch_batchnorm(torch.nn.BatchNorm1d(3))
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        assert not compat.torch_has_hooks(variable.value)
        hook = getattr(variable.value, register)(lambda _: None)
        assert compat.torch_has_hooks(variable.value)
        hook.remove()
    before = compat.torch_writes(variable.value)
    with torch.no_grad():
        variable.value.add_(1)
    assert compat.torch_writes(compat.torch_parameter(variable)) == before + 1
    with torch.inference_mode():
        assert compat.torch_writes(torch.zeros(3).add_(1)) == 0
    module = torch.nn.BatchNorm1d(3)
    assert compat.torch_buffers(module)["running_mean"] is module.running_mean
    assert not compat.is_torch_batchnorm(torch.nn.LayerNorm(3))


@pytest.mark.backends("jax")
def test_private_names_of_jax(model):
    groups = [model.trainable_variables, model.non_trainable_variables]
    shardings = compat.jax_shardings(model, groups)
    assert len(shardings[0]) == len(model.trainable_variables)
    compat.hold_jax_state(model, {"trainable_variables": []})
    assert model._jax_state == {"trainable_variables": []}


@pytest.mark.backends("tensorflow")
def test_autograph_leaves_our_errors():
    import tensorflow as tf

    @tf.function(autograph=True)
    def fails():
        raise compat.GraphError("in a function")

    with pytest.raises(compat.GraphError, match=r"^in a function$"):
        fails()


@pytest.mark.backends("tensorflow")
def test_graphs_of_branches_loops_and_maps():
    import tensorflow as tf

    def seen(x):
        found.append(compat.is_part(tf.compat.v1.get_default_graph()))
        return x * 2.0

    def run(x):
        tf.cond(tf.reduce_sum(x) > 0.0, lambda: seen(x), lambda: x)
        tf.while_loop(lambda x: tf.reduce_sum(seen(x)) < 9.0, lambda x: [seen(x)], [x])

    found = []
    tf.function(run, autograph=False)(tf.ones((2,)))
    tf.vectorized_map(seen, tf.ones((2,)))
    assert len(found) >= 4
    assert all(found)
    tf.function(seen, autograph=False)(tf.ones((2,)))
    assert not found[-1]


@pytest.mark.backends("tensorflow")
def test_operations_are_seen_as_they_run_or_are_traced():
    import tensorflow as tf

    seen = []
    function = tf.function(lambda x: tf.nn.relu(x, name="here"))
    with compat.operations_seen(lambda kind, name: seen.append((kind, name))):
        tf.nn.relu(1.0)
        function(tf.ones(2))
    function(tf.ones(3))
    assert [name for kind, name in seen if kind == "Relu"] == [None, "here"]
