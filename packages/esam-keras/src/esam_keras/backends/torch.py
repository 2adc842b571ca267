"""torch: eager, computing only the gradients that the mask needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import keras
import numpy as np
import torch
from keras import ops

from esam_core import ESAMConfig, ESAMValueError
from esam_keras import compat
from esam_keras.backends.assigning import AssigningBackend
from esam_keras.backends.base import Cut, ModelTraining, refuse_distribution
from esam_keras.backends.torch_state import UnknownState
from esam_keras.evaluation import Variables
from esam_keras.handover import StepVariables
from esam_keras.noise import Noise
from esam_keras.perturbation import Perturbation, norm_weights, perturb, radius_per_norm

__all__ = ["BACKEND", "TorchBackend"]

Tensor = Any


class TorchBackend(AssigningBackend):
    """Keras on torch; see `esam_keras.backends.base.Backend`."""

    def gradients(
        self,
        function: Callable[[list[Tensor], Cut], tuple[Tensor, Any]],
        variables: Sequence[Tensor],
        *,
        again: Callable[[list[Tensor]], AbstractContextManager[Any]],
    ) -> tuple[list[Tensor | None], Any]:
        leaves = [v.detach().requires_grad_() for v in variables]
        more: list[tuple[int, Tensor]] = []

        def cut(place: int, value: Tensor) -> Tensor:
            leaf = value.detach().requires_grad_()
            more.append((place, leaf))
            return leaf

        with torch.enable_grad():
            value, rest = function(leaves, cut)
            # Keras's scopes are per thread; checkpointed parts must run again in the same thread.
            with again(leaves), torch.autograd.set_multithreading_enabled(False):
                wanted = leaves + [leaf for _, leaf in more]
                found: list[Tensor | None] = (
                    list(torch.autograd.grad(value, wanted, allow_unused=True)) if wanted else []
                )
        for (place, _), g in zip(more, found[len(leaves) :], strict=True):
            if g is not None:
                found[place] = g if found[place] is None else found[place] + g
        return found[: len(leaves)], None if rest is None else _detach(rest, variables, leaves)

    def without_gradient(self, value: Tensor) -> Tensor:
        return value.detach() if value.requires_grad else value

    def dense(self, gradient: Tensor) -> Tensor:
        return gradient.to_dense() if gradient.is_sparse else gradient

    def perturb(
        self,
        gradients: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        scale: Sequence[float] | Tensor,
        rho: float,
        config: ESAMConfig,
        weight_masks: Sequence[Tensor] | None,
    ) -> Perturbation:
        """Like `esam_keras.perturbation.perturb`, with one call for all tensors."""
        places = [t for t, g in enumerate(gradients) if g is not None]
        both: list[Any] = [x for t in places for x in (gradients[t], parameters[t])]
        alike = {(x.dtype, x.device) for x in both}
        if weight_masks is not None or isinstance(scale, torch.Tensor) or len(alike) != 1:
            return perturb(gradients, parameters, scale, rho, config, weight_masks)
        ((dtype, device),) = alike
        if dtype.itemsize < 4:
            return perturb(gradients, parameters, scale, rho, config, weight_masks)
        with torch.no_grad():
            factors = torch.tensor([scale[t] for t in places], dtype=dtype, device=device)
            theta = [parameters[t] for t in places]
            directions: Any = [gradients[t] for t in places]
            lengths = directions
            if config.adaptive:
                lengths = torch._foreach_mul(theta, directions)
                directions = torch._foreach_mul(theta, lengths)
            weights = norm_weights(factors, config.norm)
            norms = torch.stack(torch._foreach_norm(lengths))
            length = torch.where(weights > 0, norms * weights.sqrt(), 0.0).norm()
            finite = torch.isfinite(length)
            common = radius_per_norm(rho, length, config)
            steps = factors * common
            if config.adaptive:
                norms = torch.stack(torch._foreach_norm(directions))
            size = torch.where(steps != 0, norms * steps, 0.0).norm()
            moved = [i for i, t in enumerate(places) if scale[t] > 0.0]
            epsilons = torch._foreach_mul([directions[i] for i in moved], [steps[i] for i in moved])
            climbed = list(parameters)
            sums = torch._foreach_add([theta[i] for i in moved], epsilons)
            for i, value in zip(moved, sums, strict=True):
                climbed[places[i]] = value
        return Perturbation(climbed, length, torch.where(finite, size, 0.0), finite)

    def weight_masks(self, seed: Tensor, like: Sequence[Tensor], beta: float) -> list[Tensor]:
        low, high = (int(word) & 0xFFFFFFFF for word in seed)
        device = like[0].device
        generator = torch.Generator(device).manual_seed((high << 32) | low)
        return [torch.rand(t.shape, generator=generator, device=device) < beta for t in like]

    def on_device(self, data: Any) -> Any:
        def moved(leaf: Any) -> Any:
            return ops.convert_to_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

        return keras.tree.map_structure(moved, data)

    def inputs_of_pass(self, x: Any) -> Any:
        """Return copies: Keras's own RandomBrightness writes to its input."""
        return keras.tree.map_structure(_copy, x)

    def value(self, variable: Any) -> Tensor:
        return variable.value.detach()

    @contextmanager
    def whole_step(self, training: ModelTraining, variables: Variables) -> Iterator[UnknownState]:
        """Let the passes use copies of the buffers; restore the generators after an error."""
        unknown = UnknownState(
            training.model,
            training.noise,
            untrained=variables.non_trainable,
            trained=() if training.has_run else variables.trainable,
        )
        try:
            unknown.use_copies()
            yield unknown
        except BaseException:
            unknown.restore_random_state()
            raise
        finally:
            unknown.put_back()

    def run_hooks(
        self, gradients: list[Tensor | None], variables: Sequence[Any]
    ) -> list[Tensor | None]:
        found = list(gradients)
        for t, variable in enumerate(variables):
            parameter = compat.torch_parameter(variable)
            if found[t] is not None and compat.torch_has_hooks(parameter):
                found[t] = _accumulated(parameter, found[t])
        return found

    def apply(self, optimizer: Any, gradients: Sequence[Any], variables: StepVariables) -> None:
        with torch.no_grad():
            optimizer.apply(list(gradients), variables)

    def keep_if(self, ok: Tensor, commit: Callable[[], None]) -> None:
        if bool(ok):
            commit()

    # -- a step of a model -------------------------------------------------------------------------

    def refuse(self, model: keras.Model) -> None:
        refuse_distribution()

    def trained(self, model: keras.Model) -> list[Any]:
        return [v for v in model.trainable_weights if compat.torch_parameter(v).requires_grad]

    def checks_context(self, model: keras.Model) -> AbstractContextManager[Any]:
        return UnknownState(model, Noise()).copies()

    def is_tracing(self, *arguments: Any) -> bool:
        return torch.compiler.is_compiling()

    def make_train_function(self, training: ModelTraining) -> Callable[[Any], dict[str, Any]]:
        steps = training.model.steps_per_execution
        if steps > 1:
            raise ESAMValueError(
                "`steps_per_execution` must be 1 with the PyTorch backend. "
                f"Received: steps_per_execution={steps}."
            )

        def train_function(data: Any) -> dict[str, Any]:
            (batch,) = data
            return self.run_counted(training, batch, training.step)

        return train_function


def _accumulated(parameter: Any, gradient: Tensor) -> Tensor | None:
    """Return `.grad` after the backward of a parameter alone, which runs its hooks."""
    before, parameter.grad = parameter.grad, None
    try:
        parameter.backward(gradient)
        return parameter.grad
    finally:
        parameter.grad = before


def _copy(leaf: Any) -> Any:
    """Return a copy of a tensor or array; torch shares the memory of arrays."""
    if isinstance(leaf, torch.Tensor):
        return leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _detach(rest: Any, variables: Sequence[Tensor], leaves: Sequence[Tensor]) -> Any:
    """Return the results of a forward without its graph; leaves become their original tensors."""
    origin = {id(leaf): variable for leaf, variable in zip(leaves, variables, strict=True)}

    def detach_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in origin:
            return origin[id(leaf)]
        return leaf.detach() if leaf.requires_grad else leaf

    state = [[detach_leaf(value) for value in group] for group in rest.state]
    return rest._replace(
        loss=detach_leaf(rest.loss),
        y_pred=keras.tree.map_structure(detach_leaf, rest.y_pred),
        state=type(rest.state)(*state),
        strangers=[(variable, detach_leaf(value)) for variable, value in rest.strangers],
    )


#: The only instance.
BACKEND = TorchBackend()
