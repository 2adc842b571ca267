"""The protocol of a backend: everything that differs between TensorFlow, JAX and torch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import keras

from esam_core import ESAMConfig, ESAMRuntimeError
from esam_keras.noise import Noise
from esam_keras.optimizer import ESAM
from esam_keras.perturbation import Perturbation
from esam_keras.plan import Drawn, Plan
from esam_keras.prepared import Prepared
from esam_keras.scope import PassScope

__all__ = ["Backend", "Cut", "ModelTraining", "Unknown", "refuse_distribution"]

Tensor = Any

#: `cut(place, value)` returns, as a leaf, a value that a forward assigned to a variable. Its
#: gradient counts as that of the variable at this place, and does not flow further back.
Cut = Callable[[int, Tensor], Tensor]


class ModelTraining(Protocol):
    """What backends use of an `esam_keras.training.Training`, whose module imports this one."""

    model: keras.Model
    esam: ESAM
    #: Whether a step has run since the last call of `prepare` that checked the model.
    has_run: bool
    noise: Noise
    #: Whether the current step has made its update; not noted while a step is traced.
    updated: bool

    @property
    def prepared(self) -> Prepared: ...

    @property
    def has_own_train_step(self) -> bool: ...

    def prepare(self, data: Any, state: Any = None) -> None: ...

    def draw(self, count: int, data: Any, *, compiled: bool, state: Any = None) -> Drawn: ...

    def step(
        self, plan: Plan, inputs: dict[str, Tensor], *arguments: Any
    ) -> tuple[Any, dict[str, Any] | None]: ...

    def counting(self, count: int) -> AbstractContextManager[None]: ...

    def finish(self, count: int, drawn: Drawn, report: dict[str, Any] | None) -> None: ...

    def with_means(self, logs: dict[str, Any], sums: list[Tensor]) -> dict[str, Any]: ...


class Unknown:
    """The state of a model that Keras does not know, during one step; here only generators.

    Args:
        model: any model.
        noise: what is known about the random numbers that its forwards draw.
    """

    def __init__(self, model: keras.Model, noise: Noise) -> None:
        self._noise = noise.begin(model)

    @contextmanager
    def one_pass(self, *, running: bool, records: bool, again: bool = False) -> Iterator[None]:
        """Run a pass from the state at the entry of the step.

        Args:
            running: whether layers normalise by the running statistics after the ascent pass.
            records: whether the state after this pass is kept.
            again: whether checkpointed parts of a pass run again.
        """
        with self._noise.one_pass(records=records, again=again):
            yield

    def check_loss(self, loss: Tensor) -> None:
        """Raise if the loss of a pass depends on trained weights, not on their values in it."""

    def keep_random_state(self) -> None:
        """Set the generators to their state after the pass that records."""
        self._noise.keep()

    def restore_random_state(self) -> None:
        """Restore the generators to their state at entry."""
        self._noise.restore()

    def keep_buffers(self) -> None:
        """Set the buffers to their values after the pass that records."""


class Backend(Protocol):
    """The parts of a step that depend on the Keras backend."""

    #: The arguments that Keras passes to `train_step`, by name.
    arguments: tuple[str, ...]

    #: Whether values that a forward assigns to trained variables, and to variables that the model
    #: does not list, are kept after it.
    keeps_assigned: bool

    #: Whether an update needs a gradient for every variable for which the optimizer was built.
    updates_all: bool = False

    #: The scope of a pass.
    pass_scope: type[PassScope] = PassScope

    # -- inside a step -----------------------------------------------------------------------------

    def gradients(
        self,
        function: Callable[[list[Tensor], Cut], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[list[Tensor]], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        """Return the derivative of a function's first result, and its second result.

        Args:
            function: takes the variables and a `Cut`; its second result is returned without a
                graph.
            variables: the variables to differentiate with respect to.
            again: returns, for the variables, the context in which the function ran its forward.
                Checkpointed parts run again in it during the backward.
        """
        ...

    def without_gradient(self, value: Tensor) -> Tensor:
        """Return a value without a gradient."""
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
        """Return theta + epsilon; see `esam_keras.perturbation.perturb`."""
        ...

    def dense(self, gradient: Tensor) -> Tensor:
        """Return a gradient as a dense tensor."""
        ...

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        """Return boolean tensors of the parameters' shapes, drawn by the backend's generator."""
        ...

    def inputs_of_pass(self, x: Any) -> Any:
        """Return a batch's inputs for one pass: copies if a layer may write to them."""
        ...

    def split(self, x: Any) -> Any:
        """Return the inputs of a pass on some samples, split over the devices as a batch is."""
        return x

    # -- a step of a model -------------------------------------------------------------------------

    def refuse(self, model: keras.Model) -> None:
        """Raise if this backend cannot run ESAM's step for a model."""
        ...

    def trained(self, model: keras.Model) -> list[Any]:
        """Return the variables that Keras's own training step trains on this backend."""
        ...

    def checks_context(self, model: keras.Model) -> AbstractContextManager[Any]:
        """Return the context of checks that run the model before its first step."""
        ...

    def is_tracing(self, *arguments: Any) -> bool:
        """Return whether the user's own compiler is tracing."""
        ...

    def step(
        self, training: ModelTraining, plan: Plan, inputs: dict[str, Tensor], *arguments: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the step that was drawn.

        Args:
            training: ESAM's part of the model.
            plan: the static part of the step.
            inputs: tensors by name.
            *arguments: see `arguments`.

        Returns:
            The result of Keras's `train_step`, and arrays for the step's report by field name.
        """
        ...

    def eager_step(self, training: ModelTraining, *arguments: Any) -> Any:
        """Draw a step, run it uncompiled, count it, and return the result of `train_step`."""
        ...

    def make_train_function(self, training: ModelTraining) -> Callable[..., Any]:
        """Return the function that `fit` calls."""
        ...


def refuse_distribution() -> None:
    """Raise if a distribution is set that would have no effect."""
    found = keras.distribution.distribution()
    if found is not None:
        raise ESAMRuntimeError(
            "`keras.distribution` works only on the JAX backend; here the model would train on "
            "one device. Use KERAS_BACKEND=jax, or esam-torch with DistributedDataParallel. "
            f"Received: {found!r}."
        )
