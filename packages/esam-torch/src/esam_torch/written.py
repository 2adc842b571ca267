"""State that a forward writes: buffers, frozen weights, attributes, global random generators.

A step runs several forwards, but written state must be as after the first one. The first steps find
what the forwards of a model write; from then on only these values are copied.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from esam_core.generators import HostRandomState
from esam_core.units import names_a_norm
from esam_torch.compat import (
    MODULE_ATTRIBUTES,
    NORM_LAYERS,
    buffers_by_name,
    count_writes,
    is_computed_weight,
)
from esam_torch.values import (
    Place,
    PlaceKey,
    State,
    all_modules,
    is_plain,
    key_of,
    places_without,
    tensors_in,
)
from esam_torch.wrappers import bare_model

__all__ = ["Candidate", "Kept", "Start", "Writes"]

#: Everything is checked in this many first steps, and in later ones whose number is a power of 2.
_WATCHED_STEPS = 3


@dataclass(frozen=True)
class Candidate:
    """A tensor that a forward may write in place.

    Args:
        tensor: the tensor.
        place: its place, or None for a parameter.
        steady: whether it is a parameter or a buffer, which are rarely replaced.
        trained: whether the optimizer trains it.
    """

    tensor: Tensor
    place: Place | None
    steady: bool
    trained: bool


@dataclass(frozen=True)
class Kept:
    """Saved values of what forwards write.

    Args:
        restarted: values that each pass must read as at the start of the step.
        statistics: running statistics, which only a descent pass on one sample reads.
        trained: trained weights.
        random: the states of the host's generators, if forwards draw from them; else None. Each
            pass must draw as at the start of the step.
    """

    restarted: State
    statistics: State
    trained: State
    random: HostRandomState | None = None

    def restart(self) -> None:
        """Restore what each pass must read as at the start of the step."""
        self.restarted.restore()
        if self.random is not None:
            self.random.restore()

    def restore(self) -> None:
        """Restore everything."""
        self.restart()
        self.statistics.restore()
        self.trained.restore()


@dataclass(frozen=True)
class Start:
    """Everything that a forward may write, at the start of a watched step.

    Args:
        state: the values.
        norms: torch's layers with running statistics that were in training mode.
        random: the states of the host's generators.
    """

    state: State
    norms: Sequence[nn.Module]
    random: HostRandomState


#: What is saved for a model whose forwards write nothing.
_NOTHING = Kept(State((), ()), State((), ()), State((), ()))


class Writes:
    """Finds and copies what the forwards of a model write.

    In the first three steps, and in later steps whose number is a power of two, everything is
    checked: parameters, buffers and attributes of all modules. The other steps only compare version
    counters of buffers and of frozen weights.

    Args:
        model: the model that `losses` calls; wrappers are unwrapped.
        trained: the parameters in the optimizer.
        weights: whether to check parameters: not with FSDP2, whose forwards replace them.

    Attributes:
        late: whether a value without a copy was written for the first time.
        draws: whether a forward draws from NumPy's or Python's random generator.
        accumulates: whether a layer's backward adds gradients to `.grad` itself.
        keeps_graphs: whether a forward puts tensors with a graph into attributes. The user may add
            them to the loss, outside `losses`.
    """

    def __init__(self, model: nn.Module, trained: Iterable[Tensor], *, weights: bool) -> None:
        self._model = bare_model(model)
        self._held = {id(t) for t in trained}
        self._weights = weights
        self._steps = 0
        self._seen_training = False
        self._places: dict[PlaceKey, Place] = {}
        self._values: set[PlaceKey] = set()  # the places whose tensors are written in place
        self._parameters: dict[int, Candidate] = {}
        self._idle: list[Candidate] = []
        self._norms = [
            module
            for module in self._model.modules()
            if isinstance(module, NORM_LAYERS) and module.track_running_stats
        ]
        self.statistics_layers: list[nn.Module] = []
        self.late = False
        self.draws = False
        self.accumulates = self.keeps_graphs = False

    @property
    def watches(self) -> bool:
        """Whether everything is checked in the next step."""
        number = self._steps + 1
        return number <= _WATCHED_STEPS or number.bit_count() == 1 or self.compares_values

    @property
    def compares_values(self) -> bool:
        """Whether this includes values: batch_norm writes without increasing the version.

        This waits for the device. It is done in the first step, and in the first one in training
        mode, because BatchNorm of the user's own may write only there.
        """
        return self._steps == 0 or (self._model.training and not self._seen_training)

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self._model.training

    def count_forward(self, *, training: bool) -> None:
        """Count the first forward of a step; one that raises an error is not counted.

        Args:
            training: whether the model was in training mode.
        """
        self._steps += 1
        self._seen_training |= training

    def training_norms(self) -> list[nn.Module]:
        """Return torch's layers with running statistics that write them now."""
        return [module for module in self._norms if module.training]

    def keep(self, start: Start | None = None) -> Kept:
        """Return the written values, as they are now or as at the start of a watched step."""
        norms = self.training_norms() if start is None else start.norms
        if not (norms or self.statistics_layers or self._places or self._parameters or self.draws):
            return _NOTHING
        statistics = [
            (buffers_by_name(module), name)
            for module in (*norms, *self.statistics_layers)
            for name in buffers_by_name(module)
        ]
        places = self._places.values()
        in_place = _tensors(p for p in places if key_of(p) in self._values)
        weights = self._parameters.values()
        state = State if start is None else start.state.part
        return Kept(
            state(places, [*in_place, *(c.tensor for c in weights if not c.trained)]),
            state(statistics, _tensors(statistics)),
            state((), [c.tensor for c in weights if c.trained]),
            (HostRandomState() if start is None else start.random) if self.draws else None,
        )

    def writers(self) -> list[nn.Module]:
        """Return the layers in training mode that write their own buffers."""
        places = {key[0] for key in self._places}
        alone = [m for m in all_modules(self._model) if m.training and not list(m.children())]
        return [m for m in alone if m in self._norms or id(buffers_by_name(m)) in places]

    @property
    def weights_too(self) -> bool:
        """Whether a forward has been seen to write weights, as those that initialise them do."""
        return bool(self._parameters)

    def versions(self) -> dict[int, int]:
        """Return the version counters, by id, of values that no forward has been seen to write."""
        return {id(c.tensor): count_writes(c.tensor) for c in self._idle}

    def learn(self, places: Iterable[Place], written: Iterable[Candidate]) -> None:
        """Record places whose objects were replaced, and tensors written in place."""
        self._places.update({key_of(place): place for place in places})
        for candidate in written:
            if candidate.place is None:
                self._parameters[id(candidate.tensor)] = candidate
            else:
                self._places[key_of(candidate.place)] = candidate.place
                self._values.add(key_of(candidate.place))

    def written_since(self, versions: Mapping[int, int]) -> list[Candidate]:
        """Return what has been written since the given version counters."""
        rows = ((c, count_writes(c.tensor)) for c in self._idle)
        found = [c for c, n in rows if versions.get(id(c.tensor), n) != n]
        # A BatchNorm layer may have been in evaluation mode when everything was checked.
        known = {id(buffers_by_name(m)) for m in self._norms if found and m.training}
        return [c for c in found if c.place is None or id(c.place[0]) not in known]

    def learn_versions(self, versions: Mapping[int, int]) -> list[Tensor]:
        """Record and return the tensors written since the given version counters."""
        found = self.written_since(versions)
        if found:
            self.late = True
            self.learn([], found)
            self.set_idle(self._idle)
        return [c.tensor for c in found]

    def writes(self, place: Place) -> bool:
        """Return whether a forward has been seen to write to a place."""
        return key_of(place) in self._places

    def find_graphs(self) -> None:
        """Find whether the last forward, with all gradients, has left graphs in attributes."""
        if self._places and not self.keeps_graphs:
            places = (
                place
                for key, place in self._places.items()
                if key not in self._values and not is_computed_weight(*place)
            )
            self.keeps_graphs = any(t.requires_grad for t in _tensors(places))

    def set_idle(self, candidates: Iterable[Candidate]) -> None:
        """Compare the version counters of the other candidates in later steps."""
        self._idle = [
            c
            for c in candidates
            if c.steady
            and not c.trained
            and id(c.tensor) not in self._parameters
            and (c.place is None or key_of(c.place) not in self._values)
        ]

    def find_statistics(self) -> None:
        """Find the modules of other libraries that normalise by batch statistics."""
        modules = all_modules(self._model)
        # A module that computes a weight (spectral_norm) has no batch statistics.
        lists = [m for m in modules if isinstance(m, ParametrizationList)]
        inside = {id(m) for those in lists for m in those.modules()}
        for module in modules:
            own = [(buffers_by_name(module), name) for name in buffers_by_name(module)]
            written = [place for place in own if key_of(place) in self._places]
            known = module in self.statistics_layers or id(module) in inside
            if not known and _keeps_statistics(module, written):
                self.statistics_layers.append(module)

    def candidates(self) -> tuple[list[Place], list[Candidate]]:
        """Return the places that a forward may set, and the tensors that it may write."""
        places: list[Place] = []
        found: list[Candidate] = []
        known = {id(module) for module in self._norms if module.training}
        for module in all_modules(self._model):
            own = [(vars(module), name) for name in vars(module) if name not in MODULE_ATTRIBUTES]
            places += own
            found += [Candidate(t, p, False, False) for p in own for t in tensors_in(p[0][p[1]])]
            if id(module) not in known:
                own = [(buffers_by_name(module), name) for name in buffers_by_name(module)]
                places += own
                found += [Candidate(t, p, True, False) for p in own for t in _tensors([p])]
            if self._weights:
                for tensor in module.parameters(recurse=False):
                    if is_plain(tensor):
                        trained = id(tensor) in self._held and tensor.requires_grad
                        found.append(Candidate(tensor, None, True, trained))
        return places, found

    def new_places(self, known: Iterable[Place]) -> list[Place]:
        """Return new places: names that a forward has created."""
        return places_without(self.candidates()[0], known)


def _tensors(places: Iterable[Place]) -> Iterator[Tensor]:
    """Yield the tensors in some places."""
    for names, name in places:
        yield from tensors_in(names.get(name))


def _keeps_statistics(module: nn.Module, written: Sequence[Place]) -> bool:
    """Return whether a module of another library seems to normalise by batch statistics.

    It has no submodules and writes floating buffers: two of the same shape, or its name contains a
    norm.
    """
    if isinstance(module, NORM_LAYERS):
        return False
    buffers = [t for t in _tensors(written) if t.is_floating_point()]
    named = names_a_norm(type(module).__name__)
    alone = next(module.children(), None) is None
    return alone and bool(buffers) and (named or len({t.shape for t in buffers}) < len(buffers))
