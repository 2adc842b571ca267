"""The untouched prefix: blocks that no perturbation reaches are run once a step, not twice.

In the ascent pass, as long as no perturbed block has run, a block's output cannot depend on the
perturbation. Its output is kept, and given again when the selection pass (gamma < 1) or the
descent pass (gamma = 1) comes by. With gamma < 1 the prefix builds no graph either, since the
ascent's gradient is for perturbed weights alone; with gamma = 1 the descent's gradient flows
through the graph that the ascent has left there.

A block is given again only where that cannot be told from running it: not where it has written
into its arguments or changed anything in the model (see `side_effects`), where its output is an
object that torch cannot look into, where the output was changed in place afterwards, or where
hooks inside it are to see it run. Such a block is run in every pass; with gamma < 1, those around
it are not. With hooks on a block's backward or on its output, the whole prefix is run again for
the descent: a hook must see the gradient once, and all of it.

Blocks are patched for the length of a pass, on the instance, and always unpatched.
"""

import contextlib
import copy
import enum
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from esam_core import ESAMRuntimeError
from esam_torch.blocks import Blocks, is_compiled, lends_its_memory
from esam_torch.guards import RandomState
from esam_torch.side_effects import hooked_backwards, hooked_within

__all__ = ["Prefix", "verified_replays"]

_verify = False


@contextlib.contextmanager
def verified_replays() -> Iterator[None]:
    """Run every replayed block as well, and raise if its output is not the one replayed.

    For tests, and for a look at a model whose blocks have side effects.

    Example:
        >>> from esam_torch.prefix import verified_replays
        >>> with verified_replays():
        ...     pass  # steps
    """
    global _verify
    before, _verify = _verify, True
    try:
        yield
    finally:
        _verify = before


#: What cannot be changed, or not without torch's knowing, where a block has it in its hands.
_TRANSPARENT = (
    Tensor | bool | int | float | complex | str | bytes | None | range | slice | enum.Enum
    | torch.dtype | torch.device | torch.layout | torch.memory_format | torch.Size
    | nn.Module
)  # fmt: skip


def _is_transparent(x: Any) -> bool:
    """Say whether torch would know of a change to a thing."""
    if isinstance(x, types.FunctionType):
        return x.__closure__ is None  # another may write to what it has closed over
    return isinstance(x, _TRANSPARENT) and not (isinstance(x, Tensor) and _opaque(x))


class _Nest:
    """What is in a nest of containers, and how often its tensors have been written to."""

    def __init__(self, tree: Any) -> None:
        self.leaves, self._spec = pytree.tree_flatten(tree)
        self.transparent = all(_is_transparent(x) for x in self.leaves)
        self._versions = self.versions() if self.transparent else []

    def versions(self) -> list[int]:
        """Return the version counters of the tensors: they count in-place changes."""
        return [x._version for x in self.leaves if isinstance(x, Tensor)]

    @property
    def written(self) -> bool:
        """Whether a tensor has been changed in place since."""
        return self._versions != self.versions()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the tensors, where they have any."""
        if not self.transparent:
            return []
        return [tuple(x.shape) for x in self.leaves if isinstance(x, Tensor)]

    @property
    def hooked(self) -> bool:
        """Whether a tensor has hooks on its gradient, other than those of torch's counters."""
        hooks = (
            hook
            for x in self.leaves
            if isinstance(x, Tensor)
            for hook in (x._backward_hooks or {}).values()
        )
        return any(getattr(hook, "__module__", None) != "torch.autograd.graph" for hook in hooks)

    def holds(self, other: "_Nest") -> bool:
        """Say whether another nest is of the same containers with the very same things in them."""
        return self._spec == other._spec and all(
            a is b for a, b in zip(self.leaves, other.leaves, strict=True)
        )

    def cloned(self) -> "_Nest":
        """Return a nest with copies of the tensors."""
        return _Nest(pytree.tree_map_only(Tensor, torch.clone, self.tree()))

    def tree(self) -> Any:
        """Return the nest, in containers of its own: others may have been changed since."""
        return pytree.tree_unflatten(self.leaves, self._spec)


def _within_a_checkpoint() -> bool:
    """Say whether a checkpoint is among the callers: torch before 2.8 has no other way to tell."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _opaque(tensor: Tensor) -> bool:
    """Say whether a tensor does not tell of changes, or lives only within a transformation."""
    return (
        tensor.is_inference()
        or tensor.is_nested
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


@dataclass
class _Record:
    """One call of a block in the ascent pass; without an output where it must be run again."""

    block: int
    training: bool
    shapes: list[tuple[int, ...]]
    random_before: RandomState
    random_after: RandomState
    statistics: list[int]  # versions of the running statistics that it reads
    effects: bool  # it did, or hooks inside it may have done, more than return its output
    output: _Nest | None


class Prefix:
    """Records the blocks before the cut in one pass and replays them in another.

    Args:
        blocks: the model's blocks.
        perturbed: ids of the perturbed parameters.
        devices: where the model's random numbers come from.
        graph: whether the prefix is run with a graph: for the descent pass to go through
            (gamma = 1), or for the full gradient's norm.
        keep: whether there will be a replay at all.
    """

    def __init__(
        self,
        blocks: Blocks,
        perturbed: set[int],
        devices: Sequence[torch.device],
        *,
        graph: bool,
        keep: bool,
    ) -> None:
        self._blocks = blocks
        self._devices = devices
        self._graph = graph
        self._keep = keep
        reached = {blocks.block_of[p] for p in perturbed if p in blocks.block_of}
        for place, module in enumerate(blocks.modules):
            if any(id(p) in perturbed for p in module.parameters()):
                reached.add(place)
        self._reached = reached
        self._harmless = set(blocks.block_of) - perturbed
        self._often = {place for place, n in Counter(blocks.calls).items() if n > 1}
        self._records: list[_Record] = []
        self._watched = False  # by hooks, which must see every gradient once
        self._ungraphed: set[int] = set()  # run without a graph, wherever they were called
        self._patches: list[tuple[nn.Module, str, bool, Any]] = []
        self.replayed = 0
        self.traced = False  # by torch.compile, which met a patched block in a compiled function

    @property
    def worthwhile(self) -> bool:
        """Whether any block runs before the first one that the perturbation reaches."""
        return self._blocks.calls[0] not in self._reached

    def clear(self) -> None:
        """Let go of what was kept."""
        self._records.clear()

    # -- the ascent pass ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the blocks before the cut in the forward that runs inside."""
        call = 0
        clean = True
        seen: set[Any] = set()

        def run(place: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal call, clean
            # The order seen when the blocks were found tells what is used between them: in any
            # other order nothing is known, and nothing more is recorded.
            known = call < len(self._blocks.calls) and self._blocks.calls[call] == place
            clean = clean and known and place not in self._reached
            call += 1
            if not clean:
                return original(*args, **kwargs)
            given = _Nest((args, kwargs))
            clean = not self._depends_on_others(given.leaves, seen)
            if not clean:
                return original(*args, **kwargs)
            module = self._blocks.modules[place]
            self._watched = self._watched or (self._graph and hooked_backwards(module))
            literal = self._checkpointed(place)
            before = RandomState(self._devices)
            state = self._blocks.effects.before(place) if self._keep else None
            with contextlib.nullcontext() if self._graph or literal else torch.no_grad():
                output = original(*args, **kwargs)
            self._ungraphed.update(set() if self._graph else {place} - self._often)
            if not self._keep:
                return output
            effects = self._blocks.effects.found(place, state) or hooked_within(module)
            kept = None
            if not literal and not effects:
                kept = self._kept(place, given, (args, kwargs), output)
            after = RandomState(self._devices)
            self._records.append(
                _Record(
                    block=place,
                    training=module.training,
                    shapes=given.shapes,
                    random_before=before,
                    random_after=after,
                    statistics=_statistics_read(module),
                    effects=effects,
                    output=kept,
                )
            )
            if kept is not None and is_compiled(module):
                return kept.tree()
            return output

        with self._patched(run):
            yield

    def _depends_on_others(self, leaves: Sequence[Any], seen: set[Any]) -> bool:
        """Say whether gradients flow to anything but unperturbed parameters of the model.

        To an input, say, whose gradient is a part of the loss; or to a perturbed parameter that
        was not used here when the blocks were found. Then the prefix is not untouched.
        """
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            return True
        asked = [x for x in tensors if x.requires_grad]
        if any(x.grad_fn is None and id(x) not in self._harmless for x in asked):
            return True
        waiting = [x.grad_fn for x in asked if x.grad_fn is not None and x.grad_fn not in seen]
        seen.update(waiting)
        while waiting:
            node = waiting.pop()
            leaf = getattr(node, "variable", None)  # an AccumulateGrad's
            if leaf is not None and id(leaf) not in self._harmless:
                return True
            for function, _ in node.next_functions:
                if function is not None and function not in seen:
                    seen.add(function)
                    waiting.append(function)
        return False

    def _checkpointed(self, place: int) -> bool:
        """Say whether a call is within a checkpoint that could not do the same call again.

        A checkpoint runs its region again in the backward, and counts on the very same tensors
        being saved. See `recomputing`.
        """
        return (self._graph or place in self._often) and _within_a_checkpoint()

    def _kept(self, place: int, given: _Nest, call: Any, output: Any) -> _Nest | None:
        """Return what can be given again in place of a call, or None."""
        if not given.transparent or given.written or not given.holds(_Nest(call)):
            return None  # it wrote into its arguments, and that would not be done again
        args, kwargs = call
        same = any(output is x for x in (*args, *kwargs.values()))
        kept = _Nest(output)
        if not kept.transparent or (same and not isinstance(output, Tensor)):
            return None
        module = self._blocks.modules[place]
        if not is_compiled(module):
            return kept
        # Where it replays a CUDA graph, the next pass writes over what this one gave, and over
        # what it has saved for its backward.
        return None if self._graph and lends_its_memory(module) else kept.cloned()

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Let checkpoints that hold both sides of the cut run again what the ascent has run."""
        if not self._ungraphed:
            yield
            return

        def run(place: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            with torch.no_grad() if place in self._ungraphed else contextlib.nullcontext():
                return original(*args, **kwargs)

        with self._patched(run):
            yield

    # -- the pass that replays ---------------------------------------------------------------------

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Give the recorded outputs again in the forward that runs inside."""
        outputs = [record.output for record in self._records if record.output is not None]
        watched = self._watched or any(output.hooked for output in outputs)
        waiting = [] if watched else list(self._records)
        matching = True

        def run(place: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal matching
            if not waiting or not matching:
                return original(*args, **kwargs)
            given = _Nest((args, kwargs))
            record = waiting.pop(0)
            matching = (
                record.block == place
                and record.training == self._blocks.modules[place].training
                and record.shapes == given.shapes
                and record.random_before == RandomState(self._devices)
                # Another call of the same layers, in training, has updated them since.
                and record.statistics == _statistics_read(self._blocks.modules[place])
            )
            # An output that was changed in place after the block gave it is no longer its output.
            output = record.output if matching else None
            if output is None or output.written or not given.transparent:
                # What follows in the ascent's graph hangs on the ascent's call. Where gradients
                # come by a side effect as well, their sum would be rounded otherwise.
                matching = matching and not (self._graph and record.effects)
                return original(*args, **kwargs)
            if _verify:
                _check(original(*args, **kwargs), output, self._blocks.names[place])
            record.random_after.restore()
            self.replayed += 1
            return output.tree()

        with self._patched(run):
            yield

    # -- patching ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _patched(self, run: Callable[[int, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
        """Send every call of a block through `run` while the context lasts."""
        try:
            for place, module in enumerate(self._blocks.modules):
                # A block compiled in place keeps its compiled call here; its `forward` is traced.
                compiled = module.__dict__.get("_compiled_call_impl") is not None
                key = "_compiled_call_impl" if compiled else "forward"
                own = key in module.__dict__
                original = module.__dict__[key] if own else getattr(module, key)
                self._patches.append((module, key, own, original))
                module.__dict__[key] = _Patch(self, place, original, run, own=own)
            yield
        finally:
            self.unpatch()

    def unpatch(self) -> None:
        """Take all patches off the blocks; may be called again where an interrupt came between."""
        while self._patches:
            module, key, own, original = self._patches[-1]
            if own:
                module.__dict__[key] = original
            else:
                module.__dict__.pop(key, None)
            self._patches.pop()


def _statistics_read(module: nn.Module) -> list[int]:
    """Return the versions of the running statistics that a call of a module would use."""
    return [
        buffer._version
        for layer in module.modules()
        if isinstance(layer, _NormBase) and not layer.training
        for buffer in layer.buffers(recurse=False)
        if not buffer.is_inference()
    ]


class _Patch:
    """Sends a call of one block through `run`; a copy of the block gets its own call back."""

    def __init__(
        self,
        prefix: Prefix,
        place: int,
        original: Callable[..., Any],
        run: Callable[[int, Callable[..., Any], Any, Any], Any],
        *,
        own: bool,
    ) -> None:
        self._prefix = prefix
        self._module = prefix._blocks.modules[place]
        self._place = place
        self._original = original
        self._run = run
        self._own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            self._prefix.traced = True
            return self._original(*args, **kwargs)
        return self._run(self._place, self._original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own or id(self._module) not in memo:
            return copy.deepcopy(self._original, memo)
        twin = memo[id(self._module)]
        return types.MethodType(type(twin).forward, twin)


def _check(fresh: Any, replayed: _Nest, name: str) -> None:
    """Raise if a block does not give again what it gave."""
    for a, b in zip(_Nest(fresh).leaves, replayed.leaves, strict=True):
        if not (_same(a, b) if isinstance(a, Tensor) else a is b or a == b):
            raise ESAMRuntimeError(
                f"Block {name!r} gave another output when it was run again on the same input: it "
                "is not a function of its input, weights and torch's random state."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal, NaN to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())
