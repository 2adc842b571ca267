"""All private names of Keras and its backends that this package uses, one function each.

Keras has no public interface for them. Each has its own test, which fails by name if a new version
of Keras lacks it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import tree
from keras.src.backend import compute_output_spec, get_keras_mask, set_keras_mask
from keras.src.callbacks.monitor_callback import MonitorCallback

from esam_core import ESAMRuntimeError

__all__ = [
    *("MOMENTS", "BaseAverages", "GraphError", "accumulated_gradients", "added_losses_kept"),
    *("attributes", "build_from", "clip_gradients", "compiled_losses", "direct_layers"),
    *("distribution_strategy", "ema_variables", "first_moment", "flat_layers", "flat_metrics"),
    *("get_keras_mask", "has_compiled_loss", "hold_jax_state", "inbound_tensors"),
    *("is_checkpointed", "is_part", "is_sparse", "is_torch_batchnorm", "jax_shardings"),
    *("know_variables", "known_variables", "masks_of", "moments_name", "operations_seen"),
    *("optimizer_of", "output_spec", "own_trainable_variables", "own_variables"),
    *("reads_optionals", "set_keras_mask", "static_shape", "sublayers", "takes_training"),
    "teach_monitors",
    *("tell_read", "torch_buffers", "torch_has_hooks", "torch_parameter", "torch_writes"),
    *("total_loss", "track_loss", "with_masks"),
]

Tensor = Any

#: The attributes with the first moments of Keras's optimizers. SGD's is a sum of steps, -lr g.
MOMENTS = {
    "SGD": "momentums",
    "Adam": "_momentums",
    "Adamax": "_m",
    "Lamb": "_momentums",
    "Lion": "_momentums",
    "Muon": "momentums",
    "Nadam": "_momentums",
}


@contextmanager
def added_losses_kept(model: keras.Model) -> Iterator[None]:
    """Keep the losses that layers have added in a pass, which another call of the model drops."""
    before = [(layer, set(layer._loss_ids)) for layer in flat_layers(model)]
    try:
        yield
    finally:
        for layer, ids in before:
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)


# -- masks -----------------------------------------------------------------------------------------


def masks_of(structure: Any) -> list[Tensor | None]:
    """Return the masks that Keras attached to the leaves of a structure."""
    return [get_keras_mask(leaf) for leaf in tree.flatten(structure)]


def with_masks(structure: Any, masks: Sequence[Tensor | None]) -> Any:
    """Return a structure with masks attached to its leaves, since transformations remove them."""
    leaves = tree.flatten(structure)
    for leaf, mask in zip(leaves, masks, strict=True):
        if mask is not None:
            set_keras_mask(leaf, mask)
    return tree.pack_sequence_as(structure, leaves)


# -- models ----------------------------------------------------------------------------------------


def build_from(model: keras.Model, data: Any) -> None:
    """Build a model, its metrics and its loss from a batch.

    The model does not run, unless it is eager and reads values, which symbolic tensors do not have.
    """
    try:
        model._symbolic_build(data_batch=data)
        return
    except RuntimeError:
        if not model.run_eagerly:
            raise
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    y_pred = model(x, training=False)
    model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    model._compute_loss(x, y, y_pred, sample_weight, training=False)
    model.reset_metrics()
    model._symbolic_build(data_batch=data)


def flat_layers(layer: Any) -> list[Any]:
    """Return a layer and all nested layers."""
    return list(layer._flatten_layers())


def direct_layers(model: Any) -> list[Any]:
    """Return the layers of a model, in the order of execution where it is known.

    Not every class that trains is a `keras.Model`: a layer can have Keras's trainer as a mixin.
    """
    return list(model.layers) if hasattr(model, "layers") else sublayers(model)


def sublayers(layer: Any) -> list[Any]:
    """Return the layers directly inside a layer."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def static_shape(tensor: Any) -> Sequence[int | None]:
    """Return the shape of a tensor, None where it is unknown; () if its rank is."""
    shape = tensor.shape
    if getattr(shape, "rank", 0) is None:  # TensorFlow
        return ()
    return [n if isinstance(n, int) else None for n in shape]


def own_trainable_variables(layer: Any) -> list[Any]:
    """Return a layer's trainable variables, without those of nested layers."""
    return list(layer._trainable_variables)


def inbound_tensors(layer: Any) -> tuple[list[Any], list[Any]] | None:
    """Return the inputs and outputs of a layer's first call, or None if it was never called."""
    nodes = getattr(layer, "_inbound_nodes", ())
    return (nodes[0].input_tensors, nodes[0].output_tensors) if nodes else None


def takes_training(model: keras.Model) -> bool:
    """Return whether a model's `call` has an argument `training`."""
    return bool(model._call_has_training_arg)


def output_spec(function: Callable[..., Any], *specs: Any) -> Any:
    """Return the output shapes of a function for inputs of given shapes."""
    return compute_output_spec(function, *specs)


# -- losses and metrics ----------------------------------------------------------------------------


def has_compiled_loss(model: keras.Model) -> bool:
    """Return whether `compile` was given a loss."""
    return model._compile_loss is not None


def compiled_losses(model: keras.Model) -> list[Any]:
    """Return the `Loss` objects of a compiled model, without duplicates; they are built lazily."""
    compiled = model._compile_loss
    flat = [] if compiled is None else compiled._flat_losses or []
    return list({id(part.loss): part.loss for part in flat}.values())


def total_loss(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Tensor:
    """Return the loss that a model trains on, including regularisation."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)


def track_loss(model: keras.Model, loss: Tensor, count: Any) -> None:
    """Add a batch's loss to the mean in the logs."""
    model._loss_tracker.update_state(loss, sample_weight=count)


def flat_metrics(model: keras.Model, logs: dict[str, Any]) -> Any:
    """Return logs in the format of `train_on_batch`: a list, or one number."""
    return model._flatten_metrics_in_order(logs)


def is_sparse(leaf: Any) -> bool:
    """Return whether a leaf of a batch is a backend's sparse tensor."""
    return type(leaf).__name__ in ("SparseTensor", "BCOO")


def teach_monitors(directions: dict[str, str], logs_of: Callable[[Any], tuple[str, ...]]) -> None:
    """Let callbacks with `monitor="sharpness"` or similar work without `mode`.

    Keras looks for a direction in the model's metrics, but these logs are not metrics.

    Args:
        directions: "min" or "max" by the name of a log.
        logs_of: returns which of these logs a model has.
    """
    original = MonitorCallback._set_monitor_op

    def set_monitor_op(self: Any) -> None:
        if self.mode == "auto" and self.monitor in logs_of(self.model):
            self.mode = directions[self.monitor]
        original(self)

    MonitorCallback._set_monitor_op = set_monitor_op


# -- optimizers and variables ----------------------------------------------------------------------


def ema_variables(optimizer: Any) -> list[Any]:
    """Return an optimizer's moving averages, for `SwapEMAWeights`."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return ema_variables(optimizer.inner_optimizer)
    return optimizer._model_variables_moving_average


class BaseAverages:
    """Lets callbacks of Keras find the averages and the parts of an optimizer's `base_optimizer`.

    `SwapEMAWeights` swaps in the averages; the parts are those of a `MultiOptimizer`.
    """

    @property
    def _model_variables_moving_average(self) -> Any:
        return ema_variables(self.base_optimizer)  # type: ignore[attr-defined]

    @property
    def optimizers(self) -> Any:
        """The optimizers in a `MultiOptimizer`; an AttributeError if the base is not one."""
        base: Any = self.base_optimizer  # type: ignore[attr-defined]
        if isinstance(base, keras.optimizers.LossScaleOptimizer):
            base = base.inner_optimizer
        return base.optimizers


def own_variables(optimizer: Any) -> list[Any]:
    """Return an optimizer's variables, the counter of its updates first; not of one inside it."""
    return list(optimizer._variables)


def know_variables(optimizer: Any, variables: Sequence[Any]) -> None:
    """Tell an optimizer which variables of a model it trains.

    Straight into the instance: Keras would track them as the optimizer's own.
    """
    optimizer.__dict__["_trainable_variables"] = list(variables)


def known_variables(optimizer: Any) -> list[Any]:
    """Return the variables of a model that an optimizer trains."""
    return list(optimizer._trainable_variables)


def moments_name(optimizer: Any) -> str | None:
    """Return the attribute with an optimizer's first moments, or None if it is not known."""
    for kind, name in MOMENTS.items():
        if isinstance(optimizer, getattr(keras.optimizers, kind, ())):
            return name
    return None


def first_moment(optimizer: Any, variable: Any) -> Any:
    """Return the first moment that an optimizer keeps for a variable, or None."""
    found = getattr(optimizer, moments_name(optimizer) or "", None)
    return found[optimizer._get_variable_index(variable)] if found else None


def accumulated_gradients(optimizer: Any, variables: Sequence[Any]) -> list[Any]:
    """Return the sums of the gradients that an optimizer has accumulated, of these variables."""
    places = [optimizer._get_variable_index(variable) for variable in variables]
    return [optimizer._accumulated_gradients[place] for place in places]


def clip_gradients(optimizer: Any, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients as an optimizer clips them."""
    return list(optimizer._clip_gradients(list(gradients)))


def optimizer_of(optimizer: Any, variable: Any) -> Any:
    """Return which of a `MultiOptimizer`'s optimizers trains a variable."""
    place = optimizer._var_to_optimizer_idx[optimizer._var_key(variable)]
    return optimizer.optimizers[place]


def torch_parameter(variable: Any) -> Any:
    """Return a variable's parameter on torch, independent of its value in a scope."""
    return variable._value


# -- backends --------------------------------------------------------------------------------------


class GraphError(ESAMRuntimeError):
    """An error inside a function of the user, which TensorFlow's AutoGraph leaves as it is."""

    ag_pass_through = True


def distribution_strategy(model: keras.Model) -> Any:
    """Return the `tf.distribute` strategy in which a model was created, or None."""
    return model._distribute_strategy


def attributes(layer: Any) -> dict[str, Any]:
    """Return a layer's attributes, without TensorFlow's own records for checkpoints."""
    return {name: value for name, value in vars(layer).items() if not name.startswith("_self_")}


def is_checkpointed(layer: Any) -> bool:
    """Return whether a layer's calls are checkpointed by a `keras.RematScope` for whole layers."""
    scope: Any = getattr(layer, "_remat_mode", None)
    mode = getattr(scope, "mode", None)
    return mode == "full" or (mode == "list_of_layers" and layer.name in scope.layer_names)


def is_part(graph: Any) -> bool:
    """Return whether a graph is of a branch, a loop or a `tf.vectorized_map`, not a function."""
    parts = ("CondBranchFuncGraph", "WhileBodyFuncGraph", "WhileCondFuncGraph")
    mapped = graph.name == "f" and "loop_body" in graph.get_name_scope().split("/")
    return mapped or type(graph).__name__ in parts


def tell_read(variable: Any) -> None:
    """Tell TensorFlow's functions with their own gradient that they read a variable.

    In a scope they read a value instead. Now they read the variable too, to differentiate by it.
    """
    from tensorflow.python import pywrap_tfe

    pywrap_tfe.TFE_Py_VariableWatcherVariableAccessed(variable._value)


@contextmanager
def operations_seen(look: Callable[[str, str | None], None]) -> Iterator[None]:
    """Tell about each TensorFlow operation of this thread that runs, or is traced, in the context.

    Args:
        look: takes the operation's type, and its name; None if it runs uncompiled.
    """
    from tensorflow.python.framework import op_callbacks

    def told(kind: Any, _: Any, __: Any, ___: Any, op_name: Any = None, graph: Any = None) -> None:  # noqa: ARG001
        look(kind.decode() if isinstance(kind, bytes) else kind, op_name)

    op_callbacks.add_op_callback(told)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(told)


def reads_optionals(model: keras.Model) -> bool:
    """Return whether Keras's TensorFlow trainer converts absent optional inputs to None."""
    return hasattr(model, "_autoconvert_optionals")


def hold_jax_state(model: keras.Model, state: dict[str, Any]) -> None:
    """Set the values that `fit` restores into the variables after an exception."""
    model._jax_state = state


def jax_shardings(model: keras.Model, groups: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Return the shardings of the state over the devices."""
    if hasattr(model, "_get_state_sharding_spec"):  # it warns about inconsistent shardings
        return model._get_state_sharding_spec()
    return tuple([variable.value.sharding for variable in group] for group in groups)


def torch_buffers(module: Any) -> dict[str, Any]:
    """Return a torch module's own buffers by name: the dictionary in which it keeps them."""
    return module._buffers


def torch_writes(tensor: Any) -> int:
    """Return how often a torch tensor's memory was written to in place, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def torch_has_hooks(parameter: Any) -> bool:
    """Return whether a torch parameter has hooks for its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def is_torch_batchnorm(module: Any) -> bool:
    """Return whether a torch module normalises by batch statistics and has running statistics."""
    import torch

    return isinstance(module, torch.nn.modules.batchnorm._NormBase)
