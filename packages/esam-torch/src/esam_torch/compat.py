"""Every private name of PyTorch that esam-torch leans on, and why. Each has a test of its own."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = [
    "BATCH_NORM",
    "COMPILED_MODELS_SEE_REQUIRES_GRAD",
    "NORM_LAYERS",
    "active_replicas",
    "buffers_by_name",
    "compiled_call",
    "compiled_original",
    "fsdp_parameter_groups",
    "is_compiled_function",
    "parametrizations_are_cached",
    "saves_state_dict_hooks",
    "times_written",
    "untraced",
    "without_global_step_hooks",
    "without_hooks",
]

#: The common base of torch's BatchNorm layers.
BATCH_NORM = nn.modules.batchnorm._BatchNorm

#: The common base of torch's layers with running statistics. `batch_norm` counts no versions.
NORM_LAYERS = nn.modules.batchnorm._NormBase


#: Whether a compiled model notices that weights are no longer trained: before torch 2.13 its guards
#: do not (2.6 and 2.8 raise an error of their own; what is between has not been tried).
COMPILED_MODELS_SEE_REQUIRES_GRAD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def buffers_by_name(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, to be read and written: `named_buffers` copies."""
    return module._buffers


def times_written(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def compiled_original(module: Any) -> nn.Module | None:
    """Return the module that torch.compile has wrapped in this one, or None."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def compiled_call(module: nn.Module) -> bool:
    """Return whether `module.compile()` has been called."""
    return module.__dict__.get("_compiled_call_impl") is not None


def is_compiled_function(function: Callable[..., Any]) -> bool:
    """Return whether a function is what torch.compile returned."""
    # torch marks what `torch.compiler.disable` returned as well.
    made = hasattr(function, "_torchdynamo_orig_callable")
    return made and not getattr(function, "_torchdynamo_disable", False)


def untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns; torch.compile calls it and does not trace it.

    `torch.compiler.disable` imports the compiler at once, which takes seconds. Where nobody has
    imported it, nothing is compiled.
    """
    if torch.compiler.is_compiling() or "torch._dynamo.eval_frame" in sys.modules:
        return _call_untraced(function, *args)
    return function(*args)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _call_untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function outside of what is compiled."""
    return function(*args)


def active_replicas() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel in whose forward this is called, or None."""
    found = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return found if isinstance(found, DistributedDataParallel) else None


@contextlib.contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Leave the tensors' own hooks out of the backwards that run while the context lasts."""
    own = [
        hooks
        for tensor in tensors
        for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        if hooks
    ]
    with _emptied(own):
        yield


@contextlib.contextmanager
def without_global_step_hooks() -> Iterator[None]:
    """Leave out the hooks that are registered for every optimizer's step.

    They have run for ESAM's own step, within which the base optimizer's is made.
    """
    with _emptied([_global_optimizer_pre_hooks, _global_optimizer_post_hooks]):
        yield


@contextlib.contextmanager
def _emptied(own: list[Any]) -> Iterator[None]:
    """Empty dictionaries as long as the context lasts."""
    kept = [dict(hooks) for hooks in own]
    try:
        for hooks in own:
            hooks.clear()
        yield
    finally:
        for hooks, those in zip(own, kept, strict=True):
            hooks.update(those)


def parametrizations_are_cached() -> bool:
    """Return whether `torch.nn.utils.parametrize.cached()` is open."""
    return parametrize._cache_enabled > 0


def fsdp_parameter_groups(module: Any) -> list[Any]:
    """Return FSDP2's own records of a module; they have moved between versions of torch."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    groups = list(several) if several is not None else [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def saves_state_dict_hooks(optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """Return the hooks around an optimizer's `state_dict` and `load_state_dict`, by name."""
    return {
        "before saving": list(optimizer._optimizer_state_dict_pre_hooks.values()),
        "after saving": list(optimizer._optimizer_state_dict_post_hooks.values()),
        "before loading": list(optimizer._optimizer_load_state_dict_pre_hooks.values()),
        "after loading": list(optimizer._optimizer_load_state_dict_post_hooks.values()),
    }
