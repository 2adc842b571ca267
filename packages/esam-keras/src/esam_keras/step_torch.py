"""The step on torch: eager, with nothing computed that the mask makes needless."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import torch

from esam_core import ESAMValueError
from esam_keras.commit import step
from esam_keras.distribution import refuse_distribution
from esam_keras.plan import Drawn
from esam_keras.torch_state import UnknownState

__all__ = [
    "ARGUMENTS",
    "NATIVE",
    "eager_step",
    "is_tracing",
    "make_train_function",
    "refuse",
    "step",
]

#: What Keras hands to `train_step` on this backend.
ARGUMENTS = ("data",)

Tensor = Any


class Native(threading.local):
    """The native parts of the passes: see `esam_keras.passes.Backend`.

    Several threads may train, each a model of its own.
    """

    _unknown: UnknownState | None = None

    def gradients(
        self,
        function: Callable[[list[Tensor]], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        """Return the gradients, and the function's second result without its graph."""
        with torch.enable_grad():
            leaves = [v if v.requires_grad else v.detach().requires_grad_() for v in variables]
            value, rest = function(leaves)
            # Keras's scopes are of one thread; so must be what is checkpointed and runs again.
            with again(), torch.autograd.set_multithreading_enabled(False):
                gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return list(gradients), keras.tree.map_structure(_detached, rest)

    def dense(self, gradient: Tensor) -> Tensor:
        """Return a gradient as an ordinary tensor."""
        return gradient.to_dense() if gradient.is_sparse else gradient

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        """Return masks of single weights."""
        low, high = (int(word) & 0xFFFFFFFF for word in seed)
        device = like[0].device
        generator = torch.Generator(device).manual_seed((high << 32) | low)
        return [torch.rand(t.shape, generator=generator, device=device) < beta for t in like]

    def pass_context(self, model: keras.Model, running: bool) -> AbstractContextManager[None]:
        """Start a forward from the state at entry, of which Keras does not know all."""
        if self._unknown is None:
            return nullcontext()
        return self._unknown.one_pass(running=running)

    def value(self, variable: Any) -> Tensor:
        """Return a variable's value, for as long as nobody assigns to it."""
        return variable.value.detach()

    @contextmanager
    def whole_step(self, model: keras.Model) -> Iterator[None]:
        """Keep what the ascent pass made of torch's generators and of wrapped modules' buffers."""
        self._unknown = UnknownState(model)
        try:
            yield
            self._unknown.keep()
        except BaseException:
            self._unknown.restore()
            raise
        finally:
            self._unknown = None

    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Make the update."""
        with torch.no_grad():
            optimizer.apply(list(gradients), list(variables))

    def keep_if(self, ok: Tensor, commit: Callable[[], None]) -> None:
        """Commit if the step is to be kept."""
        if bool(ok):
            commit()


NATIVE = Native()


def _detached(leaf: Any) -> Any:
    """Return a tensor without its graph."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def refuse(model: keras.Model) -> None:  # noqa: ARG001  # as every backend's
    """Raise where this backend cannot do ESAM's step."""
    refuse_distribution()


def is_tracing(data: Any) -> bool:  # noqa: ARG001
    """Say whether `torch.compile` of the user's own is at work."""
    return torch.compiler.is_compiling()


def eager_step(training: Any, data: Any) -> dict[str, Any]:
    """Make one step."""
    return _one(training, data, step)


def _one(training: Any, data: Any, make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Draw what a step is to do, make it, and count it."""
    training.prepare(data)
    count = int(training.esam.count.value)
    drawn: Drawn = training.draw(count, data, compiled=False)
    with training.stepping(drawn.plan, _device(drawn.inputs)) as current:
        logs = make(training, current, data)
    training.finish(count, drawn, current.report)
    training.esam.count.assign(count + 1)
    return logs


def _device(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the inputs as tensors on the default device."""
    return {name: keras.ops.convert_to_tensor(value) for name, value in inputs.items()}


def make_train_function(training: Any) -> Callable[[Any], dict[str, Any]]:
    """Return what `fit` calls: a list with one batch to logs."""
    model = training.model
    if model.steps_per_execution > 1:
        raise ESAMValueError(
            "`steps_per_execution` must be 1 with the PyTorch backend. "
            f"Received: steps_per_execution={model.steps_per_execution}."
        )

    def of_the_model(training: Any, current: Any, data: Any) -> dict[str, Any]:  # noqa: ARG001
        return model.train_step(data)

    def train_function(data: Any) -> dict[str, Any]:
        (batch,) = data
        return training.shown(_one(training, batch, of_the_model))

    return train_function
