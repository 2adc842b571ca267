"""The interface that a backend implements for the conformance kit.

The kit does not use a framework. It passes a problem as data to an *adapter*, which builds the
framework's model, optimizer and batches, and returns a *session*: one training run that the kit
steps and reads through NumPy arrays. A backend needs two small classes:

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

Layouts. Problems have channels last; the adapter converts inputs and outputs:

- `Dense.weight` is (in, out): the layer computes `x @ weight + bias`. torch transposes it.
- `Conv.weight` is (height, width, in, out); stride 1, no padding ("valid"), cross-correlation.
  torch permutes it to (out, in, height, width), and its inputs to channels first.
- Inputs are (b, features), (b, height, width, channels), or (b, length) integers for an
  `Embedding`, whose output is (b, length, features).
- `GlobalMean` averages over every axis between the first and the last of that layout.

Names. A parameter is "<layer's name>.weight" or "<layer's name>.bias" (in a `BatchNorm`: scale
and shift), a running statistic "<layer's name>.mean" or "<layer's name>.variance", the state of a
`Carry` "<layer's name>.state", for every framework. If a sampler needs blocks, the block of a
parameter is its layer's name, and the blocks run in the order of `Problem.layers`.

Units. The draws of a mask follow the order of the units: that of `Problem.layers`, in each layer
the weight before the bias, without frozen parameters.

A backend declares what it cannot show in `gaps`, with the reason: no check is skipped silently.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from esam_core.problem import Base, Batch, Conventions, Problem

__all__ = ["CAPABILITIES", "Adapter", "Fault", "Observed", "Session"]

Array = NDArray[Any]

#: What a session may support in addition to `step`, `weights` and `buffers`. Each is expected
#: unless the adapter's `gaps` names it; the checks that need it are then reported as gaps.
CAPABILITIES: Mapping[str, str] = {
    "losses": "`Observed.losses`",
    "perturbed_losses": "`Observed.perturbed_losses`",
    "indices": "`Observed.indices`",
    "sample_weights": "`Observed.sample_weights`",
    "perturbed": "`Observed.perturbed`",
    "perturbation_norm": "`Observed.perturbation_norm`",
    "gradient_norm": "`Observed.gradient_norm`",
    "gradient": "`Observed.gradient`, the descent gradient that the base optimizer used",
    "passes": "`Observed.passes`, how many samples each pass evaluated",
    "backward": "`Session.backward`, `gradients`, `zero_gradients`, `apply`: separate update",
    "faults": "the `fault` argument of `step`: raise inside a pass",
    "state": "`Session.state` and `load`: save and resume",
    "random": "`Session.random_probe`: the state of the native random generators",
    "dropout": "`Dropout` layers",
    "carry": "`Carry` layers: forwards that write state for later ones",
    "groups": "`groups`: rho, adaptive and perturb of single parameters",
    "frozen": "`frozen`: parameters that are not trained",
    "ascend": "`ascend=`: directions other than `Batch()`, and `Observed.part`",
    "weight_masks": "masks of single weights, `Bernoulli(beta, unit='weight')`",
}


@dataclass(frozen=True)
class Fault:
    """A fault inside a step: raise `error` in evaluation number `call` of the losses.

    Args:
        call: 1 for the first pass (the ascent), then in the order of `Observed.passes`.
        error: the exception to raise there, after that pass's evaluation of the losses.
    """

    call: int
    error: BaseException


@dataclass(frozen=True, eq=False)
class Observed:
    """The observations of one step, as copied NumPy arrays and Python numbers.

    A field is None if the step did not need to compute it, exactly as in `StepReport`, or if `gaps`
    names it. The first eight are the report's fields with the same names.

    Args:
        losses: (b,), in the session's dtype.
        perturbed_losses: (b,) or None.
        indices: (k,) integers or None.
        sample_weights: (k,) or None.
        perturbed: names (see the module) of the perturbed parameters.
        perturbation_norm: 0.0 for a base step.
        gradient_norm: None for a base step; with norm="none", that of "masked".
        part: (n,) integers or None.
        gradient: by name, the gradients that the base optimizer's update used (for `step`) or that
            this call added (for `backward`).
        passes: the number of samples of each evaluation of the losses, in order: (8, 8, 4) for
            b = 8 and gamma = .5; (8,) for a base step. With `Part(0.25)`, `TopIncrease(0.5)`:
            (2, 6, 8, 4), for the part, the other samples without gradients, selection and descent.
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
    """One training run. Methods in `CAPABILITIES` are called only if they are not declared gaps."""

    def step(self, batch: Batch, fault: Fault | None = None) -> Observed:
        """Run one whole training step, including the update, like the backend's user.

        Gradients of earlier steps are not used. After a `backward`, until `apply` or
        `zero_gradients`, this raises a RuntimeError and changes nothing: it would drop gradients
        that wait for an update. Without ESAM (`esam=None`) this is one step of the base optimizer
        on the mean loss; then only `Observed.losses` needs to be set.
        """
        ...

    def weights(self) -> dict[str, Array]:
        """Return exact copies of all parameters by name, including frozen ones."""
        ...

    def buffers(self) -> dict[str, Array]:
        """Return copies of all running statistics and states of `Carry` layers, by name."""
        ...

    def trainable(self) -> dict[str, bool]:
        """Return whether each parameter is trained, read from the framework (gap "frozen")."""
        ...

    def backward(self, batch: Batch) -> Observed:
        """Run the passes of one step, adding to the gradients, without the update."""
        ...

    def gradients(self) -> dict[str, Array]:
        """Return copies of the framework's gradients, without absent ones."""
        ...

    def zero_gradients(self) -> None:
        """Reset all gradients, like the framework's user before a step."""
        ...

    def apply(self) -> None:
        """Run the base optimizer's update with the current gradients."""
        ...

    def state(self) -> Any:
        """Return the contents of a checkpoint: weights, buffers and the optimizer's state.

        Later steps must not change it.
        """
        ...

    def load(self, state: Any) -> None:
        """Load a state returned by this or another session with the same arguments."""
        ...

    def random_probe(self) -> Array:
        """Return numbers that identify the state of the framework's random generators.

        They must not change the state. Examples are the raw state, or the next numbers to be drawn.
        """
        ...


class Adapter(Protocol):
    """The kit's interface to a backend.

    Attributes:
        name: the name in reports.
        dtypes: "float64" and/or "float32"; most checks use the first, some use all.
        conventions: see `Conventions`.
        gaps: capability (a key of `CAPABILITIES`) or name of a check -> why the backend cannot.
    """

    @property
    def name(self) -> str:
        """The name in reports."""
        ...

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes to check, the most precise first."""
        ...

    @property
    def conventions(self) -> Conventions:
        """Where the framework's conventions differ."""
        ...

    @property
    def gaps(self) -> Mapping[str, str]:
        """What the backend cannot do or show, with reasons."""
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
        """Build model, base optimizer and ESAM, and return them as a training run.

        Args:
            problem: the model; in training mode.
            base: the base optimizer over all parameters that are not frozen.
            esam: keyword arguments of the backend's `ESAM` other than base optimizer and model,
                passed on unchanged (it must raise the errors); None for the base optimizer alone.
            dtype: the dtype of weights, inputs, losses and gradients.
            frozen: names of parameters that are not trained; always whole layers.
            groups: name of a parameter -> its own "rho", "adaptive" or "perturb"; or None.
            seed: the seed of the framework's random generators (dropout, masks of single weights).
        """
        ...
