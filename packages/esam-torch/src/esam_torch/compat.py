"""All private names of PyTorch and Lightning that esam-torch uses, and why. Each has its own test.

The exception is `torch._foreach_add_` and its relatives, operations on lists of tensors: torch
documents them, as a beta interface, and its own optimizers are made of them. They are called where
they are needed. Only `_foreach_clone`, which older versions lack, is here.
"""

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import TorchFunctionMode

__all__ = [
    "ATTENTION_KERNELS",
    "BATCH_NORM",
    "COMPILED_MODELS_SEE_REQUIRES_GRAD",
    "COMPILED_NODE",
    "DEFAULT_DEVICE_IS_KNOWN",
    "HOOKS",
    "LIGHTNINGS_HOOK",
    "MODULE_ATTRIBUTES",
    "NORM_LAYERS",
    "RECURRENT_KERNELS",
    "SUBMODULES",
    "active_replicas",
    "buffers_by_name",
    "call_untraced",
    "clone_all",
    "compiled_call",
    "compiled_original",
    "count_all_writes",
    "count_compiled_frames",
    "count_writes",
    "distribute",
    "eager_code",
    "fsdp_gathered",
    "fsdp_parameter_groups",
    "fsdp_process_groups",
    "fsdp_reshards",
    "is_active",
    "is_compiled_function",
    "is_computed_weight",
    "original_name",
    "parametrizations_are_cached",
    "registered_parameters",
    "saves_state_dict_hooks",
    "uncounted_writes",
    "without_global_step_hooks",
    "without_hooks",
]

_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

#: The common base of torch's BatchNorm layers.
BATCH_NORM = nn.modules.batchnorm._BatchNorm

#: Copies a list of tensors; older versions of torch have no single call for it.
_CLONE: Callable[[Sequence[Tensor]], Iterable[Tensor]] = getattr(
    torch, "_foreach_clone", lambda tensors: [tensor.clone() for tensor in tensors]
)

#: Whether one context preserves the version counters of several tensors; not in torch 2.6.
_PRESERVES_SEVERAL = "tensors" in inspect.signature(_unsafe_preserve_version_counter).parameters

#: The attributes that every module has, which users' forwards do not write.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))

#: Those of them that contain the hooks of its forward and of its backward.
HOOKS = frozenset(n for n in MODULE_ATTRIBUTES if n.startswith(("_forward_", "_backward_")))

#: The attribute that contains a module's submodules, by name. They can be replaced by others.
SUBMODULES = "_modules"

#: The attribute in which Lightning's modules note which hook is running, which decides what may be
#: logged.
LIGHTNINGS_HOOK = "_current_fx_name"

#: The common base of torch's layers with running statistics. `batch_norm` does not count versions.
NORM_LAYERS = nn.modules.batchnorm._NormBase


#: Whether a compiled model notices that weights are no longer trained. Before torch 2.13 its guards
#: do not (2.6 and 2.8 raise an error; the versions in between have not been tested).
COMPILED_MODELS_SEE_REQUIRES_GRAD = _VERSION >= (2, 13)

#: Whether `torch.get_default_device` sees a `with torch.device(...)`. It does not in torch 2.6.
DEFAULT_DEVICE_IS_KNOWN = _VERSION >= (2, 13)


def buffers_by_name(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own dictionary of buffers, which can be changed; `named_buffers` copies."""
    own: Any = module._buffers
    if isinstance(own, dict):
        return own
    # A scripted module: its buffers are written in place, but not replaced.
    return _OF_SCRIPTED.setdefault(module, dict(module.named_buffers(recurse=False)))


_OF_SCRIPTED: "weakref.WeakKeyDictionary[nn.Module, dict[str, Any]]" = weakref.WeakKeyDictionary()


def count_writes(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place; 0 if torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def count_all_writes(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor has been written to in place."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # torch does not count for inference tensors
        return [count_writes(tensor) for tensor in tensors]


def count_compiled_frames() -> int:
    """Return how many frames torch.compile has compiled in this process."""
    compiler: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if compiler is None else int(compiler.counters["frames"]["total"])


def eager_code() -> Any:
    """Run compiled models as they are written until the returned context is left; None if none."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return None
    return torch.compiler.set_stance("force_eager")


def is_active(mode: TorchFunctionMode) -> bool:
    """Return whether a mode that functions of torch look for is active."""
    count: int = torch._C._len_torch_function_stack()
    return any(torch._C._get_function_stack_at(i) is mode for i in range(count))


#: Recurrent layers in one kernel: on CPUs, with CUDA, with ROCm, and on Apple's GPUs.
RECURRENT_KERNELS = (
    torch.ops.aten.mkldnn_rnn_layer,
    torch.ops.aten._cudnn_rnn,
    torch.ops.aten.miopen_rnn,
    torch.ops.aten._lstm_mps,
)

#: The kernels of attention that torch's counter of operations does not know.
ATTENTION_KERNELS = tuple(
    getattr(torch.ops.aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    )
    if hasattr(torch.ops.aten, name)
)

#: The name of compiled code in an autograd graph.
COMPILED_NODE = "CompiledFunctionBackward"


def compiled_original(module: Any) -> nn.Module | None:
    """Return the module that torch.compile wrapped in this one, or None."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def original_name(name: str) -> str:
    """Return the name of a module or parameter without the parts that torch.compile adds."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def is_computed_weight(names: Mapping[str, Any], name: str) -> bool:
    """Return whether a hook computes a weight before each forward, as of weight_norm or prune.

    Args:
        names: the attributes of a module.
        name: one of them.
    """
    own = names.get("_parameters") or {}
    return f"{name}_orig" in own or f"{name}_v" in own


def compiled_call(module: nn.Module) -> bool:
    """Return whether `module.compile()` has been called."""
    return module.__dict__.get("_compiled_call_impl") is not None


def is_compiled_function(function: Callable[..., Any]) -> bool:
    """Return whether torch.compile returned this function."""
    # torch also marks the functions that `torch.compiler.disable` returns.
    made = hasattr(function, "_torchdynamo_orig_callable")
    return made and not getattr(function, "_torchdynamo_disable", False)


def call_untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function without letting torch.compile trace it, and return its result.

    `torch.compiler.disable` imports the compiler immediately, which takes seconds. If the compiler
    has not been imported, nothing is compiled.
    """
    if torch.compiler.is_compiling() or "torch._dynamo.eval_frame" in sys.modules:
        return _call_disabled(function, *args)
    return function(*args)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _call_disabled(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function outside compiled code."""
    return function(*args)


def active_replicas() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward is running, or None."""
    found = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return found if isinstance(found, DistributedDataParallel) else None


def uncounted_writes(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which writes do not change these tensors' version counters.

    Graphs that have saved the tensors stay valid: the caller must restore the values.
    """
    if _PRESERVES_SEVERAL:
        return _unsafe_preserve_version_counter(tuple(tensors))
    preserved = contextlib.ExitStack()
    for tensor in tensors:
        preserved.enter_context(_unsafe_preserve_version_counter(tensor))
    return preserved


def clone_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, in one call if torch has it."""
    with torch.no_grad():
        return list(_CLONE(tensors))


def without_hooks(
    tensors: Iterable[Tensor], *, accumulating: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Return a context that disables the tensors' hooks.

    Args:
        tensors: leaves.
        accumulating: whether gradients are accumulated into `.grad`, which runs more hooks.
    """
    own = [hooks for tensor in tensors if (hooks := tensor._backward_hooks)]
    if accumulating:
        own += [hooks for tensor in tensors if (hooks := tensor._post_accumulate_grad_hooks)]
    return _empty(own) if own else contextlib.nullcontext()


@contextlib.contextmanager
def without_global_step_hooks() -> Iterator[None]:
    """Disable the global optimizer step hooks inside the context.

    They have already run for ESAM's own step, which calls the base optimizer's.
    """
    with _empty([_global_optimizer_pre_hooks, _global_optimizer_post_hooks]):
        yield


@contextlib.contextmanager
def _empty(own: list[Any]) -> Iterator[None]:
    """Empty dictionaries inside the context."""
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


def distribute(whole: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Return a tensor that every rank has as a DTensor. Nothing is sent, except by torch 2.6."""
    from torch.distributed.tensor import distribute_tensor

    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return distribute_tensor(whole, mesh, placements)


def fsdp_gathered(group: Any) -> list[Tensor]:
    """Return the gathered weights of one of FSDP2's parameter groups; none before they exist."""
    return [p._unsharded_param for p in group.fsdp_params if hasattr(p, "_unsharded_param")]


def registered_parameters(
    modules: Iterable[nn.Module],
) -> list[tuple[dict[str, Any], str, Any]]:
    """Return where modules keep their parameters: a dictionary, the name in it and the value.

    Scripted modules keep them elsewhere.
    """
    places = [m._parameters for m in modules if isinstance(m._parameters, dict)]
    return [(registered, name, p) for registered in places for name, p in registered.items()]


def fsdp_parameter_groups(module: Any) -> list[Any]:
    """Return FSDP2's parameter groups of a module; where they are depends on torch's version."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    groups = list(several) if several is not None else [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def fsdp_reshards(group: Any) -> bool:
    """Return whether one of FSDP2's parameter groups drops gathered weights after a forward."""
    return group.post_forward_mesh_info is not None


def fsdp_process_groups(group: Any) -> list[Any]:
    """Return the process groups over which one of FSDP2's parameter groups is distributed."""
    mesh = group.mesh_info
    names = ("shard_process_group", "replicate_process_group")
    return [getattr(mesh, name) for name in names if getattr(mesh, name, None) is not None]


def saves_state_dict_hooks(optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """Return the hooks of an optimizer's `state_dict` and `load_state_dict`, by name."""
    return {
        "before saving": list(optimizer._optimizer_state_dict_pre_hooks.values()),
        "after saving": list(optimizer._optimizer_state_dict_post_hooks.values()),
        "before loading": list(optimizer._optimizer_load_state_dict_pre_hooks.values()),
        "after loading": list(optimizer._optimizer_load_state_dict_post_hooks.values()),
    }
