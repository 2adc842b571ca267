"""The model's blocks in order of execution, and the cost of each.

They are found by watching one forward: which modules are called, in which order, with how many
floating-point operations, and where each parameter is first used. The model is not changed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.attention import without_graphs
from esam_torch.compat import original_name
from esam_torch.flops import FORMULAS
from esam_torch.sharded import reshard
from esam_torch.wrappers import bare_model, is_compiled

__all__ = ["Blocks", "chosen_names", "find_blocks"]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, as found in one forward.

    Args:
        names: the blocks' names, such as "layer3", in the order of their first call.
        block_of: index of the block in which, or before which, each parameter is first used, by the
            parameter's id.
        cost_of: floating-point operations of the forward attributed to each parameter, by id.
        warning: a warning about `losses`, or None.
        asks: whether the forward has asked which parameters have a gradient.
    """

    names: tuple[str, ...]
    block_of: dict[int, int]
    cost_of: dict[int, float]
    warning: str | None = None
    asks: bool = False


@dataclass
class _Watch:
    """Observations during one forward."""

    entries: list[str] = field(default_factory=list)  # module names in the order of their calls
    flops: dict[str, int] = field(default_factory=dict)
    stack: list[tuple[str, int]] = field(default_factory=list)  # name, operations at its entry
    # by parameter id: the modules being called at its first use, and the number of calls before it
    first_use: dict[int, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    # the parameter's id, by its own id and by that of the gathered weight of a sharded model
    identity: dict[int, int] = field(default_factory=dict)
    asks: bool = False


class _FirstUses(TorchFunctionMode):
    """Records where in the forward each parameter is first used."""

    def __init__(self, parameters: Iterable[Tensor], watch: _Watch) -> None:
        super().__init__()
        watch.identity = {id(p): id(p) for p in parameters}
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == _REQUIRES_GRAD and id(args[0]) in self._watch.identity:
            self._watch.asks = True
        if not _is_about_form(func, result):
            for value in _tensors((args, kwargs or {})):
                found = self._watch.identity.get(id(value))
                if found is not None and found not in self._watch.first_use:
                    open_modules = tuple(name for name, _ in self._watch.stack)
                    self._watch.first_use[found] = (open_modules, len(self._watch.entries))
        return result


#: What Python calls to read `tensor.requires_grad`.
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]

#: Methods that depend on a tensor's metadata, but not on its values.
_FORM = frozenset(
    (
        *("size", "dim", "ndimension", "numel", "nelement", "stride"),
        *("storage_offset", "element_size", "__len__", "data_ptr", "get_device", "is_contiguous"),
        *("is_floating_point", "is_complex", "is_signed", "is_pinned", "__hash__"),
        *("register_hook", "register_post_accumulate_grad_hook", "requires_grad_"),
    )
)


def _is_about_form(func: Any, result: Any) -> bool:
    """Return whether a call reads a shape, a dtype or a gradient, which does not count as a use."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):  # a property: W.T and W.data are uses, W.shape is not
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return not isinstance(result, Tensor) or attribute == "grad"
    return name in _FORM


class _Untracked(contextlib.nullcontext[None]):
    """Replaces the counter's module tracker: everything counts as one module."""

    parents = frozenset({"Global"})


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors inside nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


class _Hook:
    """A hook that copies of the model, made during the watched forward, do not keep."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any) -> None:
    """Do nothing."""


@contextlib.contextmanager
def _hooks(model: nn.Module, watch: _Watch, counter: FlopCounterMode) -> Iterator[None]:
    """Record every module's calls and operations inside the context."""
    handles: list[Any] = []
    known = {
        (name, leaf): id(parameter)
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    }

    def enter(name: str) -> "_Hook":
        def hook(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            for leaf, parameter in module.named_parameters(recurse=False):
                if (name, leaf) in known:
                    watch.identity.setdefault(id(parameter), known[name, leaf])
            watch.entries.append(name)
            watch.stack.append((name, counter.get_total_flops()))

        return _Hook(hook)

    def leave(name: str) -> "_Hook":
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            _, before = watch.stack.pop()
            watch.flops[name] = watch.flops.get(name, 0) + counter.get_total_flops() - before

        return _Hook(hook)

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(
    model: nn.Module,
    forward: Callable[[], Any],
    trained: Set[int],
    chosen: Sequence[nn.Module | str] | None = None,
) -> Blocks:
    """Watch one forward and return the blocks of a model.

    By default the blocks are the modules that the model itself calls. A block that does more than
    half of the work, mostly in the modules that it calls, is replaced by these modules, and so on.

    Args:
        model: the trained model; wrappers are unwrapped.
        forward: runs the model once on a batch. It is called without a graph; the caller protects
            buffers and random state.
        trained: ids of the parameters that the optimizer trains.
        chosen: the blocks that the user chose, as modules of the model or their names, or None.

    Raises:
        ESAMValueError: a chosen block is not a module of the model, contains another one, or does
            not run in a forward.
    """
    inner = bare_model(model)
    scripted = [n for n, module in inner.named_modules() if isinstance(module, ScriptModule)]
    if scripted:
        raise ESAMTypeError(
            "A sampler that needs the model's blocks must be able to watch its modules run. "
            f"Received: {scripted[0]!r}, a torch.jit module. Use torch.compile instead, or "
            "a sampler that needs no blocks, such as Bernoulli."
        )
    modules = dict(inner.named_modules())
    fixed = None if chosen is None else chosen_names(chosen, modules)
    watch = _Watch()
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    # The counter's module tracker hooks into every backward, so a gradient computed within `losses`
    # would fail. Our own hooks attribute the operations to modules.
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    with (
        without_graphs(),
        torch.compiler.set_stance("force_eager"),  # compiled code does not call modules
        counter,
        _FirstUses(inner.parameters(), watch),
        _hooks(inner, watch, counter),
    ):
        forward()
    reshard(inner)
    order = tuple(dict.fromkeys(watch.entries))  # each module once, by first call
    if not order:
        raise ESAMValueError("`losses` must call `model`. Received: a function that does not.")
    blocks = _split_blocks(order, watch, modules) if fixed is None else fixed
    blocks = sorted(blocks, key=lambda name: order.index(name) if name in order else -1)
    if blocks[0] not in order:
        raise ESAMValueError(
            f"`blocks` must run in a forward. Received: {blocks[0]!r}, which does not."
        )
    place = {name: i for i, name in enumerate(blocks)}
    # The number of block calls before each module call.
    calls, seen = [], [0]
    for name in watch.entries:
        if name in place:
            calls.append(place[name])
        seen.append(len(calls))
    block_of: dict[int, int] = {}
    for parameter_id, (stack, position) in watch.first_use.items():
        inside = [place[name] for name in stack if name in place]
        # Used between blocks: it belongs to the block that runs next.
        following = calls[seen[position]] if seen[position] < len(calls) else len(blocks) - 1
        block_of[parameter_id] = inside[0] if inside else following
    here = 0
    for name, parameter in inner.named_parameters():
        # Unused in this forward: it belongs to the block that contains it, or else to the one whose
        # parameters come before it in the model.
        holders = [place[b] for b in blocks if name.startswith(b + ".")]
        here = block_of.setdefault(id(parameter), holders[0] if holders else here)
    early = _early_uses(inner, watch, block_of, place)
    clean = tuple(map(original_name, blocks))
    costs = _costs(inner, watch, block_of, blocks, trained)
    return Blocks(clean, block_of, costs, early, watch.asks)


def _early_uses(
    model: nn.Module, watch: _Watch, block_of: Mapping[int, int], place: Mapping[str, int]
) -> str | None:
    """Return a warning if a script uses the weights of several blocks before these run."""
    early = set()
    for name, parameter in model.named_parameters():
        stack, _ = watch.first_use.get(id(parameter), ((), 0))
        outside = not any(module in place for module in stack)
        early |= {
            block
            for block in place
            if outside and name.startswith(block + ".") and place[block] > block_of[id(parameter)]
        }
    if len(early) < 2:
        return None
    return (
        f"`losses` uses weights of {len(early)} blocks, including "
        f"{min(early, key=place.__getitem__)!r}, before these blocks run. Weights belong to the "
        "block that uses them first, so a suffix starts there and saves nothing. If this is a "
        "penalty on the weights, compute it after calling the model."
    )


def chosen_names(chosen: Sequence[nn.Module | str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the user's blocks.

    Args:
        chosen: modules of the model, or their names.
        modules: all modules of the model, by name.

    Raises:
        ESAMValueError: one is not a module of the model, or contains another.
        ESAMTypeError: one is neither a module nor a name.
    """
    names = {id(module): name for name, module in modules.items()}
    found: list[str] = []
    for block in chosen:
        if isinstance(block, str):
            if block not in modules:
                raise ESAMValueError(
                    f"`blocks` must name modules of the model. Received: {block!r}."
                )
            found.append(block)
        elif isinstance(block, nn.Module):
            if id(block) not in names:
                raise ESAMValueError(
                    f"`blocks` must be modules of the model. Received: a {type(block).__name__} "
                    "that is not."
                )
            found.append(names[id(block)])
        else:
            raise ESAMTypeError(f"`blocks` must be modules or their names. Received: {block!r}.")
    if not found:
        raise ESAMValueError("`blocks` must not be empty.")
    for a in found:
        for b in found:
            if a != b and (b.startswith(a + ".") or a == ""):
                raise ESAMValueError(
                    f"`blocks` must not contain one another. Received: {a!r}, {b!r}."
                )
    return list(dict.fromkeys(found))


def _called_below(parent: str, order: Sequence[str]) -> list[str]:
    """Return the called modules inside a parent that are not inside another called module of it."""
    prefix = parent + "." if parent else ""
    below = [name for name in order if name != parent and name.startswith(prefix)]
    return [
        name
        for name in below
        if not any(name.startswith(other + ".") for other in below if other != name)
    ]


def _split_blocks(
    order: Sequence[str], watch: _Watch, modules: Mapping[str, nn.Module]
) -> list[str]:
    """Return the called children of the model; one that does most of the work is split further."""
    # A container that is not called itself (such as a ModuleDict of two networks) is not a block.
    blocks = _called_below("", order) or [""]
    total = max(1, sum(watch.flops[name] for name in blocks))
    while True:
        for name in blocks:
            # A compiled module is not split.
            children = [] if is_compiled(modules[name]) else _called_below(name, order)
            work = watch.flops.get(name, 0)
            below = sum(watch.flops.get(child, 0) for child in children)
            if work > total / 2 and below > work / 2:
                place = blocks.index(name)
                blocks[place : place + 1] = children
                break
        else:
            return blocks


def _costs(
    model: nn.Module,
    watch: _Watch,
    block_of: dict[int, int],
    blocks: Sequence[str],
    trained: Set[int],
) -> dict[int, float]:
    """Distribute the operations of each block over its parameters.

    A module's own operations are distributed over the parameters used in it, by size, matrices
    before vectors. The remaining operations of a block (such as attention's products, and those of
    frozen parameters) are distributed over its trained parameters in the same way, or by size if no
    operation is attributed to them: biases, gates, prompts.
    """
    users: dict[str, list[Tensor]] = {}
    for parameter in model.parameters():
        stack, _ = watch.first_use.get(id(parameter), ((), 0))
        if stack:
            users.setdefault(stack[-1], []).append(parameter)
    costs = {id(parameter): 0.0 for parameter in model.parameters()}
    for name, parameters in users.items():
        children = _called_below(name, tuple(watch.flops))
        own = watch.flops.get(name, 0) - sum(watch.flops[child] for child in children)
        matrices = [p for p in parameters if p.dim() > 1] or parameters
        size = sum(p.numel() for p in matrices) or 1
        for matrix in matrices:
            costs[id(matrix)] = own * matrix.numel() / size
    for place, name in enumerate(blocks):
        members = [p for p in model.parameters() if block_of.get(id(p)) == place]
        bearers = [p for p in members if id(p) in trained] or members
        sizes = {id(p): costs[id(p)] for p in bearers}
        if not any(sizes.values()):
            sizes = {id(p): float(p.numel()) for p in bearers}
        work = max(watch.flops.get(name, 0), sum(costs[id(p)] for p in members))
        total = sum(sizes.values()) or 1.0
        costs |= {id(p): work * sizes.get(id(p), 0.0) / total for p in members}
    if not any(costs.values()):  # no operation was counted: use the size instead
        costs = {id(p): float(p.numel()) for p in model.parameters()}
    return costs
