"""Guards for everything that a step must restore: random state, weights, autocast and others.

Each guard saves the state when it is created, and restores it on request. None of them waits for
the device.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esam_torch.compat import BATCH_NORM, clone_all, uncounted_writes
from esam_torch.devices import default_device, on_device
from esam_torch.sharded import weight_shards
from esam_torch.targets import Targets
from esam_torch.values import is_half

__all__ = [
    *("Evaluation", "Modes", "Pruning", "RandomState", "Settings", "Weights"),
    *("shares_statistics", "statistics_layers", "without_autocast"),
]


class RandomState:
    """torch's global generators: of the CPU, and of the model's devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def has_moved(self) -> bool:
        """Return whether the state of a generator has changed."""
        now = RandomState(device for device, _ in self._others)
        then = [self._cpu, *(state for _, state in self._others)]
        found = [now._cpu, *(state for _, state in now._others)]
        return not all(map(torch.equal, then, found))

    def restore(self) -> None:
        """Restore the state of every generator."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)


class Settings:
    """Settings of a thread: autocast, default and current devices, and context variables.

    On an accelerator, a backward runs in its own thread, which has its own settings. On each device
    torch switches off the default device during a backward.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        kinds = dict.fromkeys(["cpu", *(d.type for d in devices if d.type != "meta")])
        self._current = [(m, m.current_device()) for m in map(_module_of, kinds) if m is not None]
        self._settings = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in kinds
        ]
        self._cached = torch.is_autocast_cache_enabled()
        self._default = default_device()
        self._context: contextvars.Context | None = None

    def note(self) -> None:
        """Note the context variables, which the first pass may have set."""
        self._context = contextvars.copy_context()

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function with the saved settings, and return its result.

        Before `note`, the settings are still those of the caller.
        """
        if self._context is None:
            return function(*args, **kwargs)
        with self._restoring_if_changed():
            return self._context.copy().run(function, *args, **kwargs)

    def _restoring_if_changed(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the saved settings."""
        off = not any(e or torch.is_autocast_enabled(k) for k, e, _ in self._settings)
        same = all(module.current_device() == index for module, index in self._current)
        same = same and default_device() == self._default
        return contextlib.nullcontext() if off and same else self._restoring()

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[None]:
        """Use the saved settings inside the context."""
        with contextlib.ExitStack() as stack:
            for module, index in self._current:
                stack.enter_context(module.device(index))
            if default_device() != self._default:
                stack.enter_context(self._default)
            for kind, enabled, dtype in self._settings:
                if (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) != (
                    enabled,
                    dtype,
                ):
                    stack.enter_context(
                        torch.autocast(
                            kind, dtype=dtype, enabled=enabled, cache_enabled=self._cached
                        )
                    )
            yield


@contextlib.contextmanager
def without_autocast(devices: Iterable[torch.device]) -> Iterator[None]:
    """Switch autocast off inside the context, as torch advises for a backward."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", *(device.type for device in devices)}:
            if kind != "meta" and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _module_of(kind: str) -> Any:
    """Return torch's module for a kind of devices of which one is current, such as torch.cuda."""
    module = None if kind == "cpu" else torch.get_device_module(kind)
    return module if hasattr(module, "device") else None


class Modes:
    """The training modes of modules, which the user may change between the passes.

    Args:
        modules: the modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._modes = [module.training for module in modules]

    def restoring(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the saved modes."""
        now = [module.training for module in self._modules]
        return contextlib.nullcontext() if now == self._modes else self._restoring(now)

    @contextlib.contextmanager
    def _restoring(self, now: Sequence[bool]) -> Iterator[None]:
        """Use the saved modes inside the context."""
        try:
            self._set(self._modes)
            yield
        finally:
            self._set(now)

    def _set(self, modes: Sequence[bool]) -> None:
        """Set the mode of each module, and of no submodule."""
        for module, training in zip(self._modules, modes, strict=True):
            module.training = training


class Evaluation:
    """Evaluation mode of some layers, in which BatchNorm uses its running statistics.

    `end` restores training mode, whichever line an interrupt has come at.
    """

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []

    def begin(self, layers: Iterable[nn.Module]) -> None:
        """Put layers that are in training mode in evaluation mode."""
        for layer in layers:
            self._layers.append(layer)
            layer.training = False

    def end(self) -> None:
        """Put the layers in training mode again."""
        while self._layers:
            self._layers[-1].training = True
            self._layers.pop()

    @contextlib.contextmanager
    def inside(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Put layers that are in training mode in evaluation mode inside the context."""
        try:
            self.begin(layers)
            yield
        finally:
            self.end()


class Pruning:
    """Switches off the gradients of parameters, and attention's fast path, for some passes.

    `esam_torch.attention` says why the path is switched off.

    Attributes:
        parameters: those whose gradients are switched off now.
    """

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self._fast_path = torch.backends.mha.get_fastpath_enabled()

    @contextlib.contextmanager
    def inside(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Compute no gradients of these parameters inside the context."""
        try:
            for parameter in parameters:
                if parameter.requires_grad:  # the user may have frozen it since an earlier pass
                    self.parameters.append(parameter)
                    parameter.requires_grad_(False)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Compute all gradients again; use attention's fast path again if it was used before."""
        torch.backends.mha.set_fastpath_enabled(self._fast_path)
        while self.parameters:
            self.parameters[-1].requires_grad_(True)
            self.parameters.pop()


class Weights:
    """Copies of the weights that are perturbed.

    Writes do not change autograd's version counters: the values are restored bit for bit, so a
    graph that the user still holds remains valid. For sharded parameters, this rank's shards are
    written.
    """

    def __init__(self, targets: Targets) -> None:
        self._weights = weight_shards(targets.tensors)
        self._by_kind = targets.by_kind  # what one kernel can write
        self._copies = [clone_all(weights) for weights in self._by_kind(self._weights)]

    def add(self, perturbations: list[Tensor]) -> None:
        """Add epsilon to the weights."""
        with torch.no_grad(), uncounted_writes(self._weights):
            kinds = zip(self._by_kind(self._weights), self._by_kind(perturbations), strict=True)
            for weights, epsilons in kinds:
                torch._foreach_add_(weights, epsilons)

    def share_rounded_away(self, perturbations: list[Tensor]) -> Tensor:
        """Return the share of epsilon's nonzero entries that changed no half-precision weight.

        A 0-d float32 tensor; 0 if there are no half-precision weights.
        """
        device = self._weights[0].device
        lost = torch.zeros((), device=device)
        all_ = torch.zeros((), device=device)
        kinds = zip(
            self._by_kind(self._weights), self._copies, self._by_kind(perturbations), strict=True
        )
        for weight, before, epsilon in (row for kind in kinds for row in zip(*kind, strict=True)):
            if is_half(weight):
                nonzero = epsilon != 0
                lost += on_device((nonzero & (weight == before)).sum(), device)
                all_ += on_device(nonzero.sum(), device)
        return lost / all_.clamp_min(1.0)

    def restore(self) -> None:
        """Restore theta bit for bit, even if a forward has assigned to `.data`."""
        with torch.no_grad(), uncounted_writes(self._weights):
            for weights, copies in zip(self._by_kind(self._weights), self._copies, strict=True):
                torch._foreach_copy_(weights, copies)


def statistics_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the BatchNorm layers in training mode that use only this rank's statistics.

    With several ranks, SyncBatchNorm is not one of them: it uses the statistics of all ranks, and
    waits for them.
    """
    return [
        module
        for module in modules
        if isinstance(module, BATCH_NORM) and module.training and not shares_statistics(module)
    ]


def shares_statistics(layer: nn.Module) -> bool:
    """Return whether a layer is a BatchNorm layer that shares its statistics with other ranks."""
    return (
        isinstance(layer, nn.SyncBatchNorm)
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(layer.process_group) > 1
    )
