"""The untouched prefix: what runs before all that a mask perturbs, and so gives the same again.

At theta + epsilon, an operation of a Functional or Sequential model gives what it gave at theta if
it has no perturbed variable and nothing that it reads has one behind it. The ascent pass records
what such operations hand to the others, and the selection pass takes it from there instead of
running them. With gamma = 1 there is no selection pass, and the descent goes through the graph
that the ascent has left, where the backend has graphs that outlive a pass (torch).

Compilers do the same by merging equal subexpressions; this does it where there is no compiler,
and for the layers whose randomness or custom calls they do not see through. Models of another kind
(subclassed) are run again in full, and are left to the compiler.

- Nothing is left out for which another layer's result could change: operations that share a seed
  generator, or other state, are run again; a generator that belongs to nobody (Keras's global one,
  torch's) is set to what the operation left of it.
- What an operation adds to the losses (`add_loss`, activity regularisation) is added again.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
from keras import tree
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.models.functional import Functional

__all__ = ["Graph", "Prefix", "Record", "find_graph"]

Tensor = Any

#: What each skipped operation left, by its place in the prefix: a list with one entry a call.
Record = dict[str, list[dict[str, Any]]]


class Generators(Protocol):
    """A backend's own random state, which no Keras variable holds."""

    def random_state(self) -> list[Tensor]:
        """Return its state."""
        ...

    def set_random_state(self, state: list[Tensor]) -> None:
        """Set its state."""
        ...


def find_graph(model: keras.Model) -> "Graph | None":
    """Return the graph of a Sequential or Functional model, or None for another kind."""
    functional = _functional(model)
    return None if functional is None else Graph(functional)


def _functional(model: Any) -> Any:
    """Return the Functional model that runs a model, if one does."""
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        model = model._functional
    if isinstance(model, Functional) and type(model).call is Functional.call:
        return model
    return None


@dataclass
class _Operation:
    """An operation of a graph: what it is, what it reads, whether somebody else shares it."""

    operation: Any
    parents: set[int] = field(default_factory=set)
    calls: int = 0
    variables: frozenset[int] = frozenset()
    inner: "Graph | None" = None
    shared: bool = False


class Graph:
    """The operations of a Functional model, in the order in which they run.

    Args:
        functional: a built model.
    """

    def __init__(self, functional: Any) -> None:
        self.functional = functional
        self.operations: dict[int, _Operation] = {}
        self.outputs: set[int] = set()
        producers: dict[int, int] = {}
        inputs = {id(tensor) for tensor in functional.inputs}
        by_depth = functional._nodes_by_depth
        for node in (n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth]):
            if not node.operation or node.is_input:
                continue
            key = id(node.operation)
            known = self.operations.setdefault(key, _Operation(node.operation))
            known.calls += 1
            producers.update((id(tensor), key) for tensor in node.outputs)
            known.parents |= {producers[id(t)] for t in node.input_tensors if id(t) not in inputs}
        self.outputs = {producers[id(t)] for t in functional.outputs if id(t) in producers}
        for known in self.operations.values():
            known.variables = frozenset(
                id(v) for v in getattr(known.operation, "trainable_variables", ())
            )
            inner = _functional(known.operation)
            if inner is not None and known.calls == 1:
                known.inner = Graph(inner)
        self._mark_shared()

    def _leaves(self) -> Iterator[_Operation]:
        """Yield all operations, those of nested models one by one."""
        for known in self.operations.values():
            if known.inner is None:
                yield known
            else:
                yield from known.inner._leaves()

    def _mark_shared(self) -> None:
        """Mark the operations that have state or layers in common with others."""
        owners: Counter[int] = Counter()
        for known in self._leaves():
            owners.update(_belongings(known.operation))
        for known in self._leaves():
            known.shared = any(owners[thing] > 1 for thing in _belongings(known.operation))

    @property
    def touchy(self) -> bool:
        """Whether anything in the graph shares state with others."""
        return any(known.shared for known in self._leaves())

    def untouched(self, perturbed: frozenset[int]) -> "Prefix":
        """Return what gives the same again once some variables are perturbed.

        Args:
            perturbed: ids of the perturbed variables.
        """
        kept = {
            key: known
            for key, known in self.operations.items()
            if not known.variables & perturbed
            and not (known.shared or (known.inner is not None and known.inner.touchy))
        }
        while True:  # more than once only for operations that are called more than once
            out = [key for key, known in kept.items() if not known.parents <= kept.keys()]
            if not out:
                break
            for key in out:
                del kept[key]
        outlets = self.outputs | {
            parent
            for key, known in self.operations.items()
            if key not in kept
            for parent in known.parents
        }
        inner = [
            known.inner.untouched(perturbed)
            for key, known in self.operations.items()
            if known.inner is not None and key not in kept and known.parents <= kept.keys()
        ]
        return Prefix(self, tuple(kept), frozenset(outlets & kept.keys()), tuple(inner))


def _belongings(operation: Any) -> set[int]:
    """Return ids of what would tell that an operation has been left out: state, and its layers."""
    if not isinstance(operation, keras.layers.Layer):
        return set()
    return {id(variable) for variable in operation.non_trainable_variables} | {
        id(layer) for layer in operation._flatten_layers()
    }


@dataclass(frozen=True)
class Prefix:
    """The operations of a graph that need not be run again, and of the graphs nested in it.

    Args:
        graph: whose.
        operations: their ids, in the order of execution.
        outlets: those whose results others read.
        inner: prefixes of the nested models that begin with untouched operations.
    """

    graph: Graph
    operations: tuple[int, ...]
    outlets: frozenset[int]
    inner: tuple["Prefix", ...]

    def __bool__(self) -> bool:
        return bool(self.operations) or any(self.inner)

    @contextmanager
    def recording(self, record: Record, generators: Generators) -> Iterator[None]:
        """Write into `record` what the prefix's operations leave."""

        def call(place: str, _: Any, run: Callable[..., Any], outlet: bool) -> Any:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                scope = get_stateless_scope()
                before = len(scope.losses), _random_state(scope, generators)
                outputs = run(*args, **kwargs)
                flat = tree.flatten(outputs)
                after = _random_state(scope, generators)
                record.setdefault(place, []).append(
                    {
                        "outputs": flat if outlet else [None] * len(flat),
                        "masks": [get_keras_mask(leaf) if outlet else None for leaf in flat],
                        "losses": scope.losses[before[0] :],
                        "random": after if _differ(before[1], after) else None,
                    }
                )
                return outputs

            return recorded

        with self._instead(call, "r"):
            yield

    @contextmanager
    def replaying(self, record: Record, generators: Generators) -> Iterator[None]:
        """Take from `record` what the prefix's operations leave, without running them."""
        entries = {place: iter(calls) for place, calls in record.items()}

        def call(place: str, operation: Any, *_: Any) -> Any:
            def replayed(*_: Any, **__: Any) -> Any:
                entry = next(entries[place])
                for leaf, mask in zip(entry["outputs"], entry["masks"], strict=True):
                    if mask is not None:
                        set_keras_mask(leaf, mask)
                for loss in entry["losses"]:
                    operation.add_loss(loss)
                if entry["random"] is not None:
                    _set_random_state(entry["random"], generators)
                return entry["outputs"]

            return replayed

        with self._instead(call, "r"):
            yield

    @contextmanager
    def _instead(self, call: Callable[..., Any], path: str) -> Iterator[None]:
        """Run the graph with other calls in place of those of the prefix's operations."""
        functional = self.graph.functional
        places = {key: f"{path}.{place}" for place, key in enumerate(self.operations)}

        def run_through_graph(inputs: Any, operation_fn: Any, **kwargs: Any) -> Any:
            def chosen(operation: Any) -> Any:
                run = operation_fn(operation)
                key = id(operation)
                if key not in places:
                    return run
                return call(places[key], operation, run, key in self.outlets)

            return type(functional)._run_through_graph(functional, inputs, chosen, **kwargs)

        with ExitStack() as stack:
            for place, prefix in enumerate(self.inner):
                stack.enter_context(prefix._instead(call, f"{path}.inner{place}"))
            vars(functional)["_run_through_graph"] = run_through_graph
            stack.callback(vars(functional).pop, "_run_through_graph", None)
            yield


# -- generators that belong to no layer ------------------------------------------------------------


def _random_state(scope: Any, generators: Generators) -> dict[str, Any]:
    """Return the state of Keras's global generator in a scope, and of the backend's own."""
    common = get_global_attribute("global_seed_generator")
    value = None if common is None else scope.get_current_value(common.state)
    return {"keras": value, "native": generators.random_state()}


def _differ(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Say whether something was drawn; native states are compared by value, on the host."""
    return before["keras"] is not after["keras"] or any(
        bool((a != b).any()) for a, b in zip(before["native"], after["native"], strict=True)
    )


def _set_random_state(state: dict[str, Any], generators: Generators) -> None:
    """Set what `_random_state` returned."""
    if state["keras"] is not None:
        generator = get_global_attribute("global_seed_generator")
        get_stateless_scope().add_update((generator.state, state["keras"]))
    generators.set_random_state(state["native"])
