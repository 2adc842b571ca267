"""State of a torch model that Keras does not know, and a stateless scope cannot handle.

Unseeded Dropout on Keras's torch backend draws from torch's global generators, and a
`TorchModuleWrapper` holds a module whose parameters and buffers are used as they are. Each pass of
a step starts from the generators and buffers at entry; the results of one pass are kept.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import torch

from esam_keras import compat

__all__ = ["UnknownState"]


class UnknownState:
    """The state at the entry of a step, and after the pass whose results are kept.

    Args:
        model: any model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._wrappers = [
            layer
            for layer in compat.flat_layers(model)
            if isinstance(layer, keras.layers.TorchModuleWrapper)
        ]
        self._devices = (
            [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
            if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            else []
        )
        self._entry = self._random_state()
        self._after: Any = None
        self._buffers: Any = None

    def _random_state(self) -> list[torch.Tensor]:
        """Return the states of the global generators."""
        states = [torch.get_rng_state()]
        return states + [torch.cuda.get_rng_state(device) for device in self._devices]

    def _set_random_state(self, states: list[torch.Tensor]) -> None:
        """Set the states of the global generators."""
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def one_pass(self, *, running: bool, records: bool) -> Iterator[None]:
        """Run a forward from the state at entry, with the variables' current values.

        Args:
            running: whether wrapped BatchNorm layers use their running statistics.
            records: whether the generators and buffers after this pass are kept.
        """
        self._set_random_state(self._entry)
        buffers: list[dict[str, torch.Tensor]] = []
        with ExitStack() as stack:
            for place, layer in enumerate(self._wrappers):
                start = dict(layer.module.named_buffers())
                if running and self._buffers is not None:
                    start = self._buffers[place]
                buffers.append({name: b.clone() for name, b in start.items()})
                call = _functional(layer, buffers[-1], running)
                stack.enter_context(compat.replace_calls([(layer, call)]))
            yield
        if records:
            self._after, self._buffers = self._random_state(), buffers

    def keep(self) -> None:
        """Set generators and buffers to their state after the pass that records."""
        if self._after is None:
            return
        self._set_random_state(self._after)
        for layer, buffers in zip(self._wrappers, self._buffers, strict=True):
            for name, buffer in layer.module.named_buffers():
                buffer.copy_(buffers[name])

    def restore(self) -> None:
        """Restore the generators to their state at entry; the buffers have not changed."""
        self._set_random_state(self._entry)


def _functional(layer: Any, buffers: dict[str, torch.Tensor], running: bool) -> Any:
    """Return a wrapped module's call that uses the values of its Keras variables in the scope."""
    by_parameter = {id(compat.torch_parameter(v)): v for v in layer.variables}

    def call(*args: Any, training: Any = None, **kwargs: Any) -> Any:
        module = layer.module
        module.train(training is not False)
        statistics = [
            part for part in module.modules() if running and compat.is_torch_batchnorm(part)
        ]
        for part in statistics:
            part.eval()
        values = {name: by_parameter[id(p)].value for name, p in module.named_parameters()}
        try:
            return torch.func.functional_call(module, {**values, **buffers}, args, kwargs)
        finally:
            for part in statistics:
                part.train()

    return call
