"""The protocol of a backend: all that differs between TensorFlow, JAX and torch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras

from esam_core import ESAMConfig, ESAMRuntimeError
from esam_keras.perturbation import Perturbation
from esam_keras.plan import Plan

__all__ = ["Backend", "Cut", "refuse_distribution"]

Tensor = Any

#: `cut(place, value)` returns a value that a forward assigned to a variable, as a leaf: gradients
#: by it count as those by the variable at that place, and none flow on to what it was made of.
Cut = Callable[[int, Tensor], Tensor]


class Backend(Protocol):
    """What a Keras backend does in its own way.

    A `training` is an `esam_keras.training.Training`, whose module imports this one.
    """

    #: What Keras hands to `train_step`, by name.
    arguments: tuple[str, ...]

    #: Whether values that a forward assigns to trained variables, and to those that the model does
    #: not list, outlive it.
    keeps_assigned: bool

    # -- inside a step -----------------------------------------------------------------------------

    def gradients(
        self,
        function: Callable[[list[Tensor], Cut], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[list[Tensor]], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        """Return the derivative of a function's first result by its arguments, and its second.

        Args:
            function: of the variables and a `Cut`. Its second result is returned without a graph.
            variables: what to differentiate by.
            again: of the variables, the context in which the function ran its forward: what is
                checkpointed runs once more in it while the derivative is taken.
        """
        ...

    def without_gradient(self, value: Tensor) -> Tensor:
        """Return a value that no gradient flows through."""
        ...

    def perturb(
        self,
        gradients: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        scale: Sequence[float] | Tensor,
        rho: float,
        config: ESAMConfig,
        weight_masks: Sequence[Tensor] | None,
    ) -> Perturbation:
        """Return epsilon added to theta: see `esam_keras.perturbation.perturb`."""
        ...

    def dense(self, gradient: Tensor) -> Tensor:
        """Return a gradient as an ordinary tensor."""
        ...

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        """Return tensors of booleans, drawn natively, of the parameters' shapes."""
        ...

    def inputs_of_pass(self, x: Any) -> Any:
        """Return a batch's inputs for one pass: copies where a layer may write into them."""
        ...

    def pass_context(
        self, model: keras.Model, running: bool, records: bool
    ) -> AbstractContextManager[Any]:
        """Return the context of one pass: state that Keras does not know starts as at entry.

        Args:
            model: that is run.
            running: whether normalisation is by running statistics, those after the ascent pass.
            records: whether what the pass makes of that state stays.
        """
        ...

    # -- a step of a model -------------------------------------------------------------------------

    def refuse(self, model: keras.Model) -> None:
        """Raise where this backend cannot do ESAM's step of a model."""
        ...

    def is_tracing(self, *arguments: Any) -> bool:
        """Return whether a compiler of the user's own is at work."""
        ...

    def step(
        self, training: Any, plan: Plan, inputs: dict[str, Tensor], *arguments: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Make the step that was drawn.

        Args:
            training: the model's `Training`.
            plan: what the step is specialised on.
            inputs: native tensors, by name.
            *arguments: see `arguments`.

        Returns:
            What Keras's `train_step` returns, and arrays for the step's report by field name.
        """
        ...

    def eager_step(self, training: Any, *arguments: Any) -> Any:
        """Draw a step, make it uncompiled, count it, and return what `train_step` returns."""
        ...

    def make_train_function(self, training: Any) -> Callable[..., Any]:
        """Return the function that `fit` calls."""
        ...


def refuse_distribution() -> None:
    """Raise where a distribution is set that would have no effect."""
    found = keras.distribution.distribution()
    if found is not None:
        raise ESAMRuntimeError(
            "`keras.distribution` works on the JAX backend alone; here the model would train on "
            "one device. Use KERAS_BACKEND=jax, or esam-torch with DistributedDataParallel. "
            f"Received: {found!r}."
        )
