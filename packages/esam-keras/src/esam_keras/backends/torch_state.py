"""State of a torch model that Keras does not know, and a stateless scope cannot handle.

Unseeded Dropout on Keras's torch backend draws from torch's global generators, layers may have
buffers, and a `TorchModuleWrapper` holds a module whose parameters are used as they are. Each pass
of a step starts from the generators and buffers at entry; the results of one pass are kept. During
a pass the wrapped modules have the values of their variables as parameters.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import keras
import torch

from esam_core import ESAMRuntimeError
from esam_keras import compat
from esam_keras.backends.base import Unknown
from esam_keras.noise import Noise
from esam_keras.units import torch_modules, torch_wrappers

__all__ = ["UnknownState"]


class _Generator(NamedTuple):
    """A global random generator: functions that return and set its state."""

    read: Callable[[], torch.Tensor]
    write: Callable[[torch.Tensor], None]


class _Place(NamedTuple):
    """The place of a buffer.

    Args:
        buffers: the buffers of a module, by name.
        name: the name of this one.
        is_statistic: whether it is a running statistic.
    """

    buffers: dict[str, torch.Tensor | None]
    name: str
    is_statistic: bool


class _ParameterPlace(NamedTuple):
    """The place of a parameter that is a variable of Keras.

    Args:
        holder: a dictionary or list of a module with parameters, such as an LSTM's list of weights.
        key: the key or index of this one.
        variable: the variable.
    """

    holder: Any
    key: Any
    variable: Any

    def get(self) -> torch.Tensor:
        """Return the tensor that the module has as its parameter."""
        return self.holder[self.key]

    def set(self, tensor: torch.Tensor) -> None:
        """Give the module a tensor as its parameter."""
        self.holder[self.key] = tensor


class UnknownState(Unknown):
    """The state at the entry of a step, and after the pass whose results are kept.

    From `use_copies` until `put_back` the model has copies of its buffers.

    Args:
        model: any model.
        noise: what is known about the random numbers that its forwards draw.
        untrained: its variables that no pass may write to in place.
        trained: its variables that no loss may use themselves, if that is checked.
    """

    def __init__(
        self,
        model: keras.Model,
        noise: Noise,
        untrained: Sequence[Any] = (),
        trained: Sequence[Any] = (),
    ) -> None:
        super().__init__(model, noise)
        layers = compat.flat_layers(model)
        wrappers = torch_wrappers(layers)
        self._parameters = _places_of_parameters(wrappers)
        self._places = _places_of_buffers(layers)
        self._buffers = self._read()
        self._trained = {id(compat.torch_parameter(v)): v for v in trained}
        self._untrained = [(v, compat.torch_parameter(v)) for v in untrained]
        self._writes = [compat.torch_writes(tensor) for _, tensor in self._untrained]
        self._generators = _generators()
        self._entry = self._random_state()
        self._random_after: list[torch.Tensor] | None = None
        self._buffers_after: list[torch.Tensor] | None = None

    def _random_state(self) -> list[torch.Tensor]:
        """Return the states of the global generators."""
        return [generator.read() for generator in self._generators]

    def _set_random_state(self, states: list[torch.Tensor]) -> None:
        """Set the states of the global generators."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.write(state)

    def _read(self) -> list[Any]:
        """Return the tensors that the model has as its buffers."""
        return [place.buffers.get(place.name) for place in self._places]

    def _write(self, tensors: Sequence[Any]) -> None:
        """Give the model tensors as its buffers."""
        for place, tensor in zip(self._places, tensors, strict=True):
            place.buffers[place.name] = tensor

    def use_copies(self) -> None:
        """Give the model copies of its buffers."""
        self._write(_copies(self._buffers))

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Give the model copies of its buffers inside the context; restore the generators."""
        self.use_copies()
        try:
            yield
        finally:
            self.put_back()
            self.restore_random_state()

    @contextmanager
    def one_pass(self, *, running: bool, records: bool, again: bool = False) -> Iterator[None]:
        """Run a pass from the state at entry, with the variables' values in the current scope.

        Args:
            running: whether running statistics start as they are after the pass that records, if
                there was one.
            records: whether the generators and buffers after this pass are kept.
            again: whether checkpointed parts of a pass run again.
        """
        outer = self._random_state(), self._read()
        start = self._buffers
        if running and self._buffers_after is not None:
            both = zip(self._places, start, self._buffers_after, strict=True)
            start = [after if place.is_statistic else entry for place, entry, after in both]
        with ExitStack() as stack:
            stack.callback(self._write, outer[1])
            stack.callback(self._set_random_state, outer[0])
            self._set_random_state(self._entry)
            stack.enter_context(super().one_pass(running=running, records=records, again=again))
            self._write(_copies(start))
            for place in self._parameters:
                stack.callback(place.set, place.get())
                place.set(place.variable.value)
            yield
            self._refuse_writes()
            if records:
                self._random_after, self._buffers_after = self._random_state(), self._read()

    def check_loss(self, loss: torch.Tensor) -> None:
        for leaf in _leaves(loss) if self._trained else ():
            variable = self._trained.get(id(leaf))
            if variable is not None:
                keys = [place.key for place in self._parameters if place.variable is variable]
                raise ESAMRuntimeError(
                    "A call must read trained weights where Keras or their torch module keeps them "
                    "(`layer.kernel`, `module.weight`): references elsewhere, such as in a tuple "
                    "or another object, are the weights themselves instead of the perturbed "
                    "values, and would not be trained. Received: a loss that depends on a "
                    f"reference to {variable.path}{f' ({keys[0]!r})' if keys else ''}."
                )

    def _refuse_writes(self) -> None:
        """Raise if a pass has written in place to an untrained weight, as each pass would."""
        for (variable, tensor), before in zip(self._untrained, self._writes, strict=True):
            if compat.torch_writes(tensor) != before:
                raise ESAMRuntimeError(
                    "A call must not write in place to the value of a Keras weight: each pass of a "
                    "step would do so again. Use `assign`, as in `self.n.assign(self.n + 1)`, or "
                    "a buffer (`register_buffer`). Received: a write to the value of "
                    f"{variable.path}, which one pass has changed."
                )

    def keep_random_state(self) -> None:
        super().keep_random_state()
        if self._random_after is not None:
            self._set_random_state(self._random_after)

    def keep_buffers(self) -> None:
        for place, new in enumerate(self._buffers_after or ()):
            old = self._buffers[place]
            if old.shape == new.shape and old.dtype == new.dtype:
                old.copy_(new.detach())
            else:  # the forward has replaced it
                self._buffers[place] = new.detach()

    def restore_random_state(self) -> None:
        """Restore the generators to their state at entry."""
        super().restore_random_state()
        self._set_random_state(self._entry)

    def put_back(self) -> None:
        """Give the model its own buffers again."""
        self._write(self._buffers)


def _generators() -> list[_Generator]:
    """Return the global generators of torch: of the CPU, and of the devices in use."""
    found = [_Generator(torch.get_rng_state, torch.set_rng_state)]
    for name, kind in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        for i in range(kind.device_count() if kind.is_initialized() else 0):
            device = torch.device(name, i)
            read = functools.partial(kind.get_rng_state, device)
            found.append(_Generator(read, functools.partial(kind.set_rng_state, device=device)))
    if torch.backends.mps.is_available():
        found.append(_Generator(torch.mps.get_rng_state, torch.mps.set_rng_state))
    return found


def _places_of_buffers(layers: Sequence[Any]) -> list[_Place]:
    """Return the places of the buffers in layers, and in the torch modules inside them."""
    modules = {id(module): module for layer in layers for module in layer.modules()}
    return [
        _Place(buffers, name, compat.is_torch_batchnorm(module))
        for module in modules.values()
        for buffers in [compat.torch_buffers(module)]
        for name, buffer in buffers.items()
        if buffer is not None
    ]


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies; a tensor in several places has one copy."""
    copies = {id(tensor): tensor.detach().clone() for tensor in tensors}
    return [copies[id(tensor)] for tensor in tensors]


def _places_of_parameters(wrappers: Sequence[Any]) -> list[_ParameterPlace]:
    """Return the places of the parameters of wrapped modules that are variables of Keras."""
    variables = {id(compat.torch_parameter(v)): v for layer in wrappers for v in layer.variables}
    modules = set(torch_modules(wrappers))
    return [
        _ParameterPlace(holder, key, variables[id(held)])
        for module in modules
        for holder in vars(module).values()
        if isinstance(holder, dict | list)
        for key, held in (holder.items() if isinstance(holder, dict) else enumerate(holder))
        if id(held) in variables
    ]


def _leaves(loss: torch.Tensor) -> Iterator[Any]:
    """Yield the tensors that the gradient of a loss flows to."""
    left, seen = [loss.grad_fn], set[Any]()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left.extend(following for following, _ in node.next_functions)
            if hasattr(node, "variable"):
                yield node.variable
