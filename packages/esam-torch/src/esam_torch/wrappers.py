"""Wrappers of models: DistributedDataParallel, DataParallel, torch.compile."""

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from esam_core import ESAMRuntimeError
from esam_torch.compat import compiled_call, compiled_original

__all__ = ["bare_model", "holds_compiled", "is_compiled", "refuse_cached", "replicas_of"]


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile."""
    inner = _inside(model)
    return model if inner is None else bare_model(inner)


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, or None if the model is not a wrapper."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module: nn.Module = model.module
        return module
    return compiled_original(model)


def replicas_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the DistributedDataParallel that a model is or that torch.compile wrapped, or None."""
    inner = compiled_original(model)
    if inner is not None:
        return replicas_of(inner)
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a call of the module runs compiled code."""
    return compiled_call(module) or compiled_original(module) is not None


def refuse_cached(model: nn.Module) -> None:
    """Raise if a model's parametrized weights are cached: perturbations would not reach them.

    Raises:
        ESAMRuntimeError: a module of the model is parametrized.
    """
    for name, module in model.named_modules():
        if is_parametrized(module):
            raise ESAMRuntimeError(
                "`torch.nn.utils.parametrize.cached()` must not be active around a step: "
                "parametrized weights are recomputed from perturbed ones. Use it inside `losses`. "
                f"Received: a cache around a step, and the parametrized module {name!r}."
            )


def holds_compiled(model: nn.Module) -> bool:
    """Return whether a model or any module of it is compiled."""
    return any(is_compiled(module) for module in model.modules())
