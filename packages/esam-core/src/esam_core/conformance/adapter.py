"""What a backend implements so that the conformance kit can drive it.

The kit never sees a framework. It hands a problem as data to an *adapter*, which builds the
native model, optimizer and batches, and gives a *session* back: one training run that the kit
steps and looks at through NumPy arrays. A backend needs two small classes:

    class Adapter:
        name = "my backend"
        dtypes = ("float64", "float32")
        conventions = Conventions()
        gaps = {"faults": "the step is compiled: nothing can be raised inside it"}

        def session(self, problem, base, esam, *, dtype, frozen, groups, seed): ...

    class MySession:
        def step(self, batch): ...
        def weights(self): ...
        ...

Layouts. Problems are written channels last, and the adapter translates on the way in and out:

- `Dense.weight` is (in, out): the layer computes `x @ weight + bias`. torch transposes it.
- `Conv.weight` is (height, width, in, out); stride 1, no padding ("valid"), cross-correlation.
  torch permutes it to (out, in, height, width), and its inputs to channels first.
- Inputs are (b, features), (b, height, width, channels), or (b, length) integers for an
  `Embedding`, whose output is (b, length, features).
- `GlobalMean` averages over every axis between the first and the last of that layout.

Names. A parameter is "<layer's name>.weight" or "<layer's name>.bias" (in a `BatchNorm`: scale
and shift), a running statistic "<layer's name>.mean" or "<layer's name>.variance", what a `Carry`
holds "<layer's name>.state", whatever the framework calls it. Where a sampler needs blocks, the
block of a parameter is its layer's name, and the blocks run in the order of `Problem.layers`.

What a backend cannot show, it declares in `gaps`, with the reason: no check is left out silently.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from esam_core.problem import Base, Batch, Conventions, Problem

__all__ = ["CAPABILITIES", "Adapter", "Fault", "Observed", "Session"]

Array = NDArray[Any]

#: What a session can be asked for beyond `step`, `weights` and `buffers`. Each is taken for
#: granted unless the adapter's `gaps` names it; the checks that need it are then reported as gaps.
CAPABILITIES: Mapping[str, str] = {
    "losses": "`Observed.losses`",
    "perturbed_losses": "`Observed.perturbed_losses`",
    "indices": "`Observed.indices`",
    "sample_weights": "`Observed.sample_weights`",
    "perturbed": "`Observed.perturbed`",
    "perturbation_norm": "`Observed.perturbation_norm`",
    "gradient_norm": "`Observed.gradient_norm`",
    "gradient": "`Observed.gradient`, the descent gradient that the base optimizer was given",
    "passes": "`Observed.passes`, how many samples each pass evaluated",
    "backward": "`Session.backward`, `gradients`, `zero_gradients`, `apply`: update set apart",
    "faults": "the `fault` argument of `step`: raise inside a pass",
    "state": "`Session.state` and `load`: save and resume",
    "random": "`Session.random_probe`: the state of the native random generators",
    "dropout": "`Dropout` layers",
    "carry": "`Carry` layers: forwards that write what later ones read",
    "groups": "`groups`: rho, adaptive and perturb of single parameters",
    "frozen": "`frozen`: parameters that are not trained",
    "ascend": "`ascend=`: directions other than `Batch()`, and `Observed.part`",
    "weight_masks": "masks of single weights, `Bernoulli(beta, unit='weight')`",
}


@dataclass(frozen=True)
class Fault:
    """What is to go wrong inside a step: in evaluation number `call` of the losses, raise `error`.

    Args:
        call: 1 for the first pass (the ascent), then on in the order of `Observed.passes`.
        error: the exception to raise there, after the forward of that pass.
    """

    call: int
    error: BaseException


@dataclass(frozen=True, eq=False)
class Observed:
    """What one step showed, as NumPy arrays and Python numbers, copied.

    A field is None where the step had no reason to compute it, exactly as in `StepReport`, or
    where `gaps` names it. The first eight are the report's fields of that name.

    Args:
        losses: (b,), in the session's dtype.
        perturbed_losses: (b,) or None.
        indices: (k,) integers or None.
        sample_weights: (k,) or None.
        perturbed: names (see the module) of the perturbed parameters.
        perturbation_norm: 0.0 for a base step.
        gradient_norm: None for a base step.
        part: (n,) integers or None.
        gradient: by name, the gradients that the base optimizer's update was given (for `step`)
            or that this call left (for `backward`).
        passes: the number of samples of each evaluation of the losses, in order: (8, 8, 4) for
            b = 8 and gamma = .5; (8,) for a base step. With `Part(0.25)`, `TopIncrease(0.5)`:
            (2, 6, 8, 4), the part, the other samples without a graph, selection and descent.
    """

    losses: Array | None = None
    perturbed_losses: Array | None = None
    indices: Array | None = None
    sample_weights: Array | None = None
    perturbed: tuple[str, ...] | None = None
    perturbation_norm: float | None = None
    gradient_norm: float | None = None
    part: Array | None = None
    gradient: Mapping[str, Array] | None = None
    passes: tuple[int, ...] | None = None


class Session(Protocol):
    """One training run. Methods named in `CAPABILITIES` are called only without such a gap."""

    def step(self, batch: Batch, fault: Fault | None = None) -> Observed:
        """Make one whole training step, update included, as the backend's user would.

        Gradients of earlier steps do not enter. Without ESAM (`esam=None`): one step of the base
        optimizer on the mean loss; only `Observed.losses` may then be filled.
        """
        ...

    def weights(self) -> dict[str, Array]:
        """Return copies of all parameters by name, frozen ones included, bit for bit."""
        ...

    def buffers(self) -> dict[str, Array]:
        """Return copies of all running statistics, and of what `Carry` layers hold, by name."""
        ...

    def trainable(self) -> dict[str, bool]:
        """Return whether each parameter is trained, read from the framework (gap "frozen")."""
        ...

    def backward(self, batch: Batch) -> Observed:
        """Make the passes of one step, adding to the gradients, without the update."""
        ...

    def gradients(self) -> dict[str, Array]:
        """Return copies of the gradients as the framework holds them; absent ones left out."""
        ...

    def zero_gradients(self) -> None:
        """Forget all gradients, as the framework's user would before a step."""
        ...

    def apply(self) -> None:
        """Make the base optimizer's own update with the gradients as they stand."""
        ...

    def state(self) -> Any:
        """Return all that a checkpoint holds: weights, buffers and the optimizer's state."""
        ...

    def load(self, state: Any) -> None:
        """Go on from what `state` of another session, made with the same arguments, returned."""
        ...

    def random_probe(self) -> Array:
        """Return numbers that tell states of the native generators apart, and change none.

        For example their raw state, or what they would draw next.
        """
        ...


class Adapter(Protocol):
    """How the kit reaches a backend.

    Attributes:
        name: shown in reports.
        dtypes: "float64" and/or "float32"; most checks run in the first, some in all.
        conventions: see `Conventions`.
        gaps: capability (a key of `CAPABILITIES`) or name of a check -> why the backend cannot.
    """

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes to check, the most precise first."""
        ...

    @property
    def conventions(self) -> Conventions:
        """Where the framework differs lawfully."""
        ...

    @property
    def gaps(self) -> Mapping[str, str]:
        """What the backend cannot do or show, each with the reason."""
        ...

    def session(
        self,
        problem: Problem,
        base: Base,
        esam: Mapping[str, Any] | None,
        *,
        dtype: str,
        frozen: Collection[str] = (),
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> Session:
        """Build model, base optimizer and ESAM, and return them as a run to be stepped.

        Args:
            problem: the model; in training mode.
            base: the base optimizer over all parameters that are not frozen.
            esam: keyword arguments of the backend's `ESAM` beside base optimizer and model, given
                to it as they are (errors must come from there); None for the base alone.
            dtype: of weights, inputs, losses and gradients.
            frozen: names of parameters that are not trained; always whole layers.
            groups: name of a parameter -> its own "rho", "adaptive" or "perturb"; or None.
            seed: of the native random generators (dropout, masks of single weights).
        """
        ...
