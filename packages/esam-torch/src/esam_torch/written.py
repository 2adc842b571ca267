"""What a forward writes beside its result: buffers, frozen weights, attributes of modules.

A step runs several forwards, and all that they write must be as after the first. What the forwards
of a model write is found in the first steps and kept from then on: only what was seen to change is
copied.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from esam_torch.compat import NORM_LAYERS, buffers_by_name, times_written
from esam_torch.values import Place, State, is_plain, parts_of, tensors_in
from esam_torch.wrappers import bare_model

__all__ = ["Forward", "Kept", "Writes"]

#: In how many first steps everything is looked at; after that, where their number is a power of 2.
_WATCHED_STEPS = 3

#: Bytes that may be copied to find out what is written, where the trained weights are smaller.
_ALLOWANCE = 2**20

#: What every module has, and no forward of the user's writes.
_MODULES_OWN = frozenset(vars(nn.Module()))

_Key = tuple[int, str]


@dataclass(frozen=True)
class _Candidate:
    """A tensor that a forward may write in place.

    Args:
        tensor: the tensor.
        place: where it is, or None for a parameter.
        steady: whether it is a parameter or a buffer, of which a model has the same ones for long.
        trained: whether the optimizer trains it.
    """

    tensor: Tensor
    place: Place | None
    steady: bool
    trained: bool


@dataclass(frozen=True)
class Kept:
    """What forwards write, as it was.

    Args:
        restarted: what each pass finds as at the start of the step.
        statistics: running statistics of batches, which only the descent on one sample reads.
        trained: trained weights.
    """

    restarted: State
    statistics: State
    trained: State

    def restore(self) -> None:
        """Put everything back."""
        self.restarted.restore()
        self.statistics.restore()
        self.trained.restore()


class Writes:
    """Finds what the forwards of a model write, and copies it.

    In the first three steps, and later where their number is a power of two, everything is looked
    at: parameters, buffers and attributes of all modules. In the other steps version counters of
    buffers and of weights that are not trained are compared, and nothing else.

    Args:
        model: what `losses` calls; wrappers are looked through.
        trained: the parameters that the optimizer holds.
        weights: whether to look at parameters: not with FSDP2, where forwards put others there.

    Attributes:
        late: whether something was written for the first time, of which there was no copy.
    """

    def __init__(self, model: nn.Module, trained: Iterable[Tensor], *, weights: bool) -> None:
        self._model = bare_model(model)
        self._held = {id(t) for t in trained}
        self._weights = weights
        self._steps = 0
        self._places: dict[_Key, Place] = {}
        self._values: set[_Key] = set()  # of the places, those whose tensors are written in place
        self._parameters: dict[int, _Candidate] = {}
        self._idle: list[_Candidate] = []
        self._norms = [
            module
            for module in self._model.modules()
            if isinstance(module, NORM_LAYERS) and module.track_running_stats
        ]
        self.statistics_layers: list[nn.Module] = []
        self.late = False

    def before_forward(self) -> "Forward":
        """Return a record of the state before the first forward of a step."""
        self._steps += 1
        watched = self._steps <= _WATCHED_STEPS or self._steps.bit_count() == 1
        return Forward(self, _Watch(self, by_value=self._steps == 1) if watched else None)

    def kept(self, start: State | None = None) -> Kept:
        """Return what is written, as it is now, or as it was in a state with copies of it."""
        norms = [module for module in self._norms if module.training]
        statistics = [
            (buffers_by_name(module), name)
            for module in (*norms, *self.statistics_layers)
            for name in buffers_by_name(module)
        ]
        places = self._places.values()
        in_place = _tensors(p for p in places if _key(p) in self._values)
        weights = self._parameters.values()
        state = State if start is None else start.part
        return Kept(
            state(places, [*in_place, *(c.tensor for c in weights if not c.trained)]),
            state(statistics, _tensors(statistics)),
            state((), [c.tensor for c in weights if c.trained]),
        )

    def versions(self) -> list[int]:
        """Return the version counters of what has not been seen to be written."""
        return [times_written(c.tensor) for c in self._idle]

    def learn(self, places: Iterable[Place], written: Iterable[_Candidate]) -> None:
        """Take note of places where other objects are now, and of tensors written in place."""
        self._places.update({_key(place): place for place in places})
        for candidate in written:
            if candidate.place is None:
                self._parameters[id(candidate.tensor)] = candidate
            else:
                self._places[_key(candidate.place)] = candidate.place
                self._values.add(_key(candidate.place))

    def learn_versions(self, versions: Sequence[int]) -> list[Tensor]:
        """Take note of what has been written since these were the version counters; return it."""
        rows = zip(self._idle, versions, strict=True)
        found = [c for c, version in rows if times_written(c.tensor) != version]
        if found:
            self.late = True
            self.learn([], found)
            self.set_idle(self._idle)
        return [c.tensor for c in found]

    def set_idle(self, candidates: Iterable[_Candidate]) -> None:
        """Compare the version counters of those that are not kept, in the steps to come."""
        self._idle = [
            c
            for c in candidates
            if c.steady
            and not c.trained
            and id(c.tensor) not in self._parameters
            and (c.place is None or _key(c.place) not in self._values)
        ]

    def find_statistics(self) -> None:
        """Find the modules that normalise by statistics of the batch and are not torch's."""
        modules = _modules(self._model)
        # What computes a weight (spectral_norm) has other statistics than the batch's.
        lists = [m for m in modules if isinstance(m, ParametrizationList)]
        inside = {id(m) for those in lists for m in those.modules()}
        for module in modules:
            own = [(buffers_by_name(module), name) for name in buffers_by_name(module)]
            written = [place for place in own if _key(place) in self._places]
            known = module in self.statistics_layers or id(module) in inside
            if not known and _keeps_statistics(module, written):
                self.statistics_layers.append(module)

    def candidates(self) -> tuple[list[Place], list[_Candidate]]:
        """Return the places where a forward may put something, and the tensors it may write."""
        places: list[Place] = []
        found: list[_Candidate] = []
        known = {id(module) for module in self._norms if module.training}
        for module in _modules(self._model):
            own = [(vars(module), name) for name in vars(module) if name not in _MODULES_OWN]
            places += own
            found += [_Candidate(t, p, False, False) for p in own for t in tensors_in(p[0][p[1]])]
            if id(module) not in known:
                own = [(buffers_by_name(module), name) for name in buffers_by_name(module)]
                places += own
                found += [_Candidate(t, p, True, False) for p in own for t in _tensors([p])]
            if self._weights:
                for tensor in module.parameters(recurse=False):
                    if is_plain(tensor):
                        trained = id(tensor) in self._held and tensor.requires_grad
                        found.append(_Candidate(tensor, None, True, trained))
        return places, found

    def new_places(self, known: Iterable[Place]) -> list[Place]:
        """Return the places that are not among those known: names that a forward has made."""
        keys = {_key(place) for place in known}
        return [place for place in self.candidates()[0] if _key(place) not in keys]


class _Watch:
    """Everything that a forward may write, as it was before.

    Args:
        writes: takes note of what is found.
        by_value: whether to compare values too, which waits for the device: batch_norm writes
            without a count.
    """

    def __init__(self, writes: Writes, *, by_value: bool) -> None:
        self._writes = writes
        self._by_value = by_value
        self._places, self._candidates = writes.candidates()
        self._marks = [_mark(c.tensor) for c in self._candidates]
        kept = writes.kept()
        self.state = State(self._places, self._affordable()).joined(
            kept.restarted, kept.statistics, kept.trained
        )

    def _affordable(self) -> list[Tensor]:
        """Return what may be copied: the smallest tensors, together not more than what is trained.

        The frozen weights under a small adapter are not copied; an average of the trained ones is.
        """
        left = max(_ALLOWANCE, sum(_bytes(c.tensor) for c in self._candidates if c.trained))
        chosen: list[Tensor] = []
        seen: set[int] = set()
        for candidate in sorted(self._candidates, key=lambda c: _bytes(c.tensor)):
            left -= _bytes(candidate.tensor)
            if left < 0:
                break
            if not candidate.trained and id(candidate.tensor) not in seen:
                seen.add(id(candidate.tensor))
                chosen.append(candidate.tensor)
        return chosen

    def compare(self) -> None:
        """Find what has been written."""
        written = {
            id(c.tensor)
            for c, mark in zip(self._candidates, self._marks, strict=True)
            if _mark(c.tensor) != mark
        }
        copied = self.state.tensors()
        self._writes.late |= any(
            id(c.tensor) in written and id(c.tensor) not in copied and not c.trained
            for c in self._candidates
        )
        if self._by_value:
            written |= {id(t) for t in self.state.unlike(without=written)}
        changed = [*self.state.changed(), *self._writes.new_places(self._places)]
        self._writes.learn(changed, [c for c in self._candidates if id(c.tensor) in written])
        self._writes.find_statistics()
        self._writes.set_idle(self._candidates)

    def undo(self) -> None:
        """Put everything back, and take away the names that the forward has made."""
        for names, name in self._writes.new_places(self._places):
            del names[name]
        self.state.restore()


class Forward:
    """The state before a step's first forward, to which later passes and errors go back.

    Args:
        writes: what is known to be written.
        watch: what looks at everything, or None in most steps.
    """

    def __init__(self, writes: Writes, watch: _Watch | None) -> None:
        self._writes = writes
        self._watch = watch
        self._start = writes.kept() if watch is None else None
        self._versions = writes.versions() if watch is None else []
        self._late: State | None = None
        self._noted = False

    def note(self) -> None:
        """Take note of what the forward, which has just been run, has written; once."""
        if self._noted:
            return
        self._noted = True
        if self._watch is not None:
            self._watch.compare()
            self._start, self._watch = self._writes.kept(self._watch.state), None
        else:
            late = self._writes.learn_versions(self._versions)
            self._late = State((), late) if late else None

    def rewind(self) -> None:
        """Let the next pass find what it reads as the first has found it."""
        if self._start is not None:
            self._start.restarted.restore()
        if self._late is not None:
            self._late.restore()

    def undo(self) -> None:
        """Put everything back that the forward may have written."""
        if self._watch is not None:
            self._watch.undo()
        if self._start is not None:
            self._start.restore()


def _key(place: Place) -> _Key:
    """Return what tells a place apart."""
    return id(place[0]), place[1]


def _tensors(places: Iterable[Place]) -> Iterator[Tensor]:
    """Yield the tensors that are in some places."""
    for names, name in places:
        yield from tensors_in(names.get(name))


def _bytes(tensor: Tensor) -> int:
    """Return how much memory a tensor's elements take."""
    return tensor.numel() * tensor.element_size()


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return what changes where a tensor is written in place, or given other memory by `.data`."""
    return times_written(tensor), tensor.data_ptr()


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, those included that others hold in lists and the like."""
    found = dict.fromkeys(model.modules())
    waiting = list(found)
    while waiting:
        module = waiting.pop()
        for name, value in vars(module).items():
            if name in _MODULES_OWN or not isinstance(value, list | tuple | dict):
                continue
            for part in parts_of(value):
                if isinstance(part, nn.Module) and part not in found:
                    new = [m for m in part.modules() if m not in found]
                    found.update(dict.fromkeys(new))
                    waiting += new
    return list(found)


def _keeps_statistics(module: nn.Module, written: Sequence[Place]) -> bool:
    """Return whether a module, not torch's, seems to normalise by statistics of the batch.

    It has no modules inside and writes floating buffers: two of one shape, or it is called a norm.
    """
    if isinstance(module, NORM_LAYERS):
        return False
    buffers = [t for t in _tensors(written) if t.is_floating_point()]
    shapes = [t.shape for t in buffers]
    named = "norm" in type(module).__name__.lower()
    inside = next(module.children(), None) is not None
    return not inside and bool(buffers) and (named or len(set(shapes)) < len(shapes))
