"""The cost of a training step: floating-point operations of the function that runs it."""

from contextlib import contextmanager

import keras
from keras import ops

from esam_keras.step import Step
from esam_keras.training import ATTRIBUTE

BACKEND = keras.backend.backend()


def flops(model, x, y):
    """Return the floating-point operations of a compiled model's step, plain or ESAM's, after the
    first. If the step uses an earlier direction, it has one.
    """
    batch = (ops.convert_to_tensor(x), ops.convert_to_tensor(y))
    training = vars(model).get(ATTRIBUTE)
    model._symbolic_build(data_batch=batch)
    model.optimizer.build(model.trainable_variables)
    if training is not None:
        model.make_train_function()
        training.prepare(batch)
        training.esam.base_optimizer.iterations.assign(1)
    return {"torch": _counted, "jax": _analysed, "tensorflow": _optimised_products}[BACKEND](
        model, training, batch
    )


def _counted(model, _, batch):
    """Torch: the operations that ran."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.train_on_batch(*batch)
    return counter.get_total_flops()


def _analysed(model, training, batch):
    """JAX: the cost analysis of the compiled function, optimised as outside the tests."""
    import jax

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in groups)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        if training is None:
            if hasattr(model, "_record_training_state_sharding_spec"):  # Keras 3.11
                model._record_training_state_sharding_spec()
            compiled = jax.jit(model.train_step).lower(state, batch).compile()
        else:
            from esam_keras.backends.jax import compiled_steps

            drawn = training.draw(0, batch, compiled=True)
            step, _ = compiled_steps(training)
            compiled = step.lower(drawn.plan, drawn.inputs, state, batch).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def _optimised_products(model, training, batch):
    """TensorFlow: the matrix products of the function after its optimiser."""
    import tensorflow as tf

    if training is None:
        function = tf.function(model.train_step, autograph=False).get_concrete_function(batch)
    else:
        drawn = training.draw(0, batch, compiled=True)
        inputs = {name: tf.convert_to_tensor(value) for name, value in drawn.inputs.items()}

        def step(inputs, data):
            return training.step(drawn.plan, inputs, data)

        function = tf.function(step, autograph=False).get_concrete_function(inputs, batch)
    left = {node.name for node in _optimised(function).node if node.op == "MatMul"}
    products = [o for o in function.graph.get_operations() if o.name in left]
    assert len(products) == len(left), "the optimiser has created products"
    return sum(_of_product(operation) for operation in products)


def _of_product(operation):
    """Return 2 m n k of a TensorFlow matrix product."""
    first = operation.inputs[0].shape
    k = first[0] if operation.get_attr("transpose_a") else first[1]
    return 2 * operation.outputs[0].shape.num_elements() * k


def _optimised(function):
    """Return the graph of a function after TensorFlow's optimiser."""
    import tensorflow as tf
    from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
    from tensorflow.python.grappler import tf_optimizer

    graph = function.graph
    described = tf.compat.v1.train.export_meta_graph(
        graph_def=graph.as_graph_def(), graph=graph, clear_devices=True
    )
    kept = meta_graph_pb2.CollectionDef()
    kept.node_list.value.extend(tensor.name for tensor in function.outputs)
    kept.node_list.value.extend(
        operation.name for operation in graph.get_operations() if "Assign" in operation.type
    )
    described.collection_def["train_op"].CopyFrom(kept)
    return tf_optimizer.OptimizeGraph(config_pb2.ConfigProto(), described)


@contextmanager
def traces(monkeypatch, *parts):
    """Yield a list that gets a plan for each step that is run or traced in Python.

    A step is a `base_step`, or `ascend`, `climb` and `descend`; `parts` lists those that count.
    """
    seen = []

    def counted(run):
        def wrapped(step, *arguments, **options):
            seen.append(step.plan)
            return run(step, *arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for part in parts or ("base_step", "ascend"):
            patch.setattr(Step, part, counted(getattr(Step, part)))
        yield seen
