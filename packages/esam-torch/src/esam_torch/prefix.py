"""The untouched prefix: blocks that no perturbation reaches are run once a step, not twice.

In the ascent pass, as long as no perturbed block has run, a block's output cannot depend on the
perturbation. Its output is kept, and given again when the selection pass (gamma < 1) or the
descent pass (gamma = 1) comes by. With gamma < 1 the prefix builds no graph either, since the
ascent's gradient is for perturbed weights alone; with gamma = 1 the descent's gradient flows
through the graph that the ascent has left there.

Blocks are patched for the length of a pass, on the instance, and always unpatched.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMRuntimeError
from esam_torch.blocks import Blocks, is_compiled
from esam_torch.guards import RandomState

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


@dataclass
class _Record:
    """One call of a block in the ascent pass."""

    block: int
    training: bool
    shapes: list[tuple[int, ...]]
    random_before: RandomState
    random_after: RandomState
    output: Any
    versions: list[int]


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
        self._records: list[_Record] = []
        self.replayed = 0

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

        def run(place: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal call, clean
            # The order seen when the blocks were found tells what is used between them: in any
            # other order nothing is known, and nothing more is recorded.
            known = call < len(self._blocks.calls) and self._blocks.calls[call] == place
            clean = clean and known and place not in self._reached
            call += 1
            if not clean:
                return original(*args, **kwargs)
            before = RandomState(self._devices)
            with contextlib.nullcontext() if self._graph else torch.no_grad():
                output = original(*args, **kwargs)
            if self._keep and is_compiled(self._blocks.modules[place]):
                # Where it replays a CUDA graph, the next pass writes over what this one gave.
                output = torch.utils._pytree.tree_map_only(Tensor, torch.clone, output)
            if self._keep:
                self._records.append(
                    _Record(
                        place,
                        self._blocks.modules[place].training,
                        _shapes((args, kwargs)),
                        before,
                        RandomState(self._devices),
                        output,
                        _versions(output),
                    )
                )
            return output

        with self._patched(run):
            yield

    # -- the pass that replays ---------------------------------------------------------------------

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Give the recorded outputs again in the forward that runs inside."""
        waiting = list(self._records)
        matching = True

        def run(place: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal matching
            if not waiting or not matching:
                return original(*args, **kwargs)
            record = waiting.pop(0)
            matching = (
                record.block == place
                and record.training == self._blocks.modules[place].training
                and record.shapes == _shapes((args, kwargs))
                and record.random_before == RandomState(self._devices)
            )
            # An output that was changed in place after the block gave it is no longer its output.
            if not matching or record.versions != _versions(record.output):
                return original(*args, **kwargs)
            if _verify:
                _check(original(*args, **kwargs), record.output, self._blocks.names[place])
            record.random_after.restore()
            self.replayed += 1
            return record.output

        with self._patched(run):
            yield

    # -- patching ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _patched(self, run: Callable[[int, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
        """Send every call of a block through `run` while the context lasts."""
        restore: list[tuple[nn.Module, str, bool, Any]] = []
        try:
            for place, module in enumerate(self._blocks.modules):
                # A block compiled in place keeps its compiled call here; its `forward` is traced.
                compiled = module.__dict__.get("_compiled_call_impl") is not None
                key = "_compiled_call_impl" if compiled else "forward"
                own = key in module.__dict__
                original = module.__dict__[key] if own else getattr(module, key)
                restore.append((module, key, own, original))
                module.__dict__[key] = _through(run, place, original)
            yield
        finally:
            for module, key, own, original in reversed(restore):
                if own:
                    module.__dict__[key] = original
                else:
                    module.__dict__.pop(key, None)


def _through(
    run: Callable[[int, Callable[..., Any], Any, Any], Any],
    place: int,
    original: Callable[..., Any],
) -> Callable[..., Any]:
    """Return a function that sends a call of one block through `run`."""

    def patched(*args: Any, **kwargs: Any) -> Any:
        return run(place, original, args, kwargs)

    return patched


def _leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of any nest that torch knows how to flatten."""
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors in a nest."""
    return [tuple(x.shape) for x in _leaves(tree)]


def _versions(tree: Any) -> list[int]:
    """Return the version counters of the tensors in a nest: they count in-place changes."""
    return [x._version for x in _leaves(tree)]


def _check(fresh: Any, replayed: Any, name: str) -> None:
    """Raise if a block does not give again what it gave."""
    for a, b in zip(_leaves(fresh), _leaves(replayed), strict=True):
        if not torch.equal(a, b):
            raise ESAMRuntimeError(
                f"Block {name!r} gave another output when it was run again on the same input: it "
                "is not a function of its input, weights and torch's random state."
            )
