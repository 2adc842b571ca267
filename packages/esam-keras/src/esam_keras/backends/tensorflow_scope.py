"""The scope of a pass on TensorFlow: it refuses reads that lose the gradient, and lost assignments.

In a pass, weights have tensors as values. A function with its own gradient (`tf.custom_gradient`,
`keras.remat`) returns gradients for its arguments and for `tf.Variable`s only; a `tf.function` of
the user keeps the values of the pass in which it is traced, or the variables themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import tensorflow as tf

from esam_core import ESAMRuntimeError
from esam_keras import compat
from esam_keras.scope import PassScope

__all__ = ["TensorFlowScope", "refuse_checkpointed", "refuse_reads"]

Tensor = Any


class TensorFlowScope(PassScope):
    """A `PassScope` that is aware of the function in which a variable is used.

    Args:
        values: as for `PassScope`.
        assigned: as for `PassScope`.
    """

    def __init__(
        self,
        values: dict[int, Tensor],
        assigned: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(values, assigned)
        self._graph = _current_graph()
        self._changed: set[int] = set()

    def get_current_value(self, variable: Any) -> Tensor:
        """Return a variable's value, or None for the variable itself.

        A function keeps the values that it reads while it is traced, so it must read variables. A
        variable has its value in the pass if it is neither trained nor assigned.
        """
        found = super().get_current_value(variable)
        if found is None:
            return None
        if variable.trainable:
            compat.tell_read(variable)
        if not self._is_in_function():
            return found
        if variable.trainable or id(variable) in self._changed:
            _refuse_read(variable)
        return None

    def add_update(self, update: tuple[Any, Tensor]) -> None:
        """Record a value assigned to a variable; raise if it exists only in a part of the pass."""
        if _current_graph() is not self._graph:
            raise compat.GraphError(
                "On TensorFlow, a compiled step cannot keep what is assigned to a variable, or "
                "drawn from a seed generator, inside a branch, a loop or a `tf.function`, such as "
                "the functions of `ops.cond` and `ops.fori_loop`. Assign or draw outside of it. "
                "For a branch or a loop, `compile(..., run_eagerly=True)` helps too. Received: an "
                f"assignment to {update[0].path}."
            )
        self._changed.add(id(update[0]))
        super().add_update(update)

    def _is_in_function(self) -> bool:
        """Return whether a `tf.function` that was called in the pass is being traced."""
        graph = _current_graph()
        while graph is not None and graph is not self._graph:
            if not compat.is_part(graph):
                return True
            graph = graph.outer_graph
        return False


@contextmanager
def refuse_reads(own: dict[int, Any]) -> Iterator[None]:
    """Raise after a pass that has read trained weights themselves, not their values in the pass.

    Args:
        own: the trained weights by the ids of their `tf.Variable`s.
    """
    with tf.GradientTape() as tape:
        yield
    for read in tape.watched_variables():
        if id(read) in own:
            _refuse_read(own[id(read)])


def refuse_checkpointed(layer: Any) -> None:
    """Raise if a layer's calls are checkpointed by a `keras.RematScope`."""
    if compat.is_checkpointed(layer):
        raise ESAMRuntimeError(
            "On TensorFlow, layers must not be made in a `keras.RematScope`: checkpointed layers "
            "get no gradient for the perturbed values. Make them without it, or train on JAX or "
            f"torch. Received: layer {layer.name!r}."
        )


def _current_graph() -> Any:
    """Return the graph that is being traced; uncompiled, a graph that stays the same."""
    return tf.compat.v1.get_default_graph()


def _refuse_read(variable: Any) -> NoReturn:
    """Raise: a weight is read where the values of a pass have no effect or no gradient."""
    raise compat.GraphError(
        "On TensorFlow, trained weights, and weights that the call has assigned, must not be read "
        "inside a `tf.function` of your own, `keras.remat`, `tf.recompute_grad` or "
        "`tf.custom_gradient`: these do not see the values of a pass, or return no gradient for "
        "them. Call the layers without it (`fit` compiles the whole step), make the weights "
        "arguments of the function with its own gradient, or checkpoint on JAX or torch. "
        f"Received: a function that reads {variable.path}."
    )
