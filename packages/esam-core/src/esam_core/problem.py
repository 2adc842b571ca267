"""Small problems as data: layers, batches and base optimizers, used by the reference and the kit.

Weights are float64 arrays with outputs on the last axis; every backend builds its native model from
these records.
"""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from esam_core import validation

__all__ = [
    "Base",
    "Batch",
    "BatchNorm",
    "Carry",
    "Conv",
    "Conventions",
    "Dense",
    "Dropout",
    "Embedding",
    "GlobalMean",
    "Layer",
    "Problem",
    "Relu",
    "Tanh",
]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Dense:
    """`x @ weight + bias`; weight (in, out), bias (out,) or None."""

    name: str
    weight: Array
    bias: Array | None = None


@dataclass(frozen=True, eq=False)
class Conv:
    """2-D cross-correlation, stride 1, no padding; weight (height, width, in, out), bias (out,)."""

    name: str
    weight: Array
    bias: Array | None = None


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """Normalise over every axis but the last, then scale by weight and shift by bias.

    In training it uses the batch's mean and (biased) variance; `mean` and `variance` are the
    initial running statistics, updated as `running = (1 - momentum) * running + momentum * batch`.
    Keras calls `1 - momentum` momentum. See `Conventions` for whether `running` takes the unbiased
    batch variance.
    """

    name: str
    weight: Array
    bias: Array
    mean: Array
    variance: Array
    momentum: float = 0.1
    eps: float = 1e-5


@dataclass(frozen=True, eq=False)
class Carry:
    """Add the state from earlier forward passes, a constant for the derivative: `x + state`.

    Each forward pass then writes `state = (state + mean of x over every axis but the last) / 2`, in
    the way in which the framework's users keep state between forward passes.
    """

    name: str
    state: Array


@dataclass(frozen=True, eq=False)
class Dropout:
    """Zero each element with probability `rate`, scale the others by 1 / (1 - rate).

    The noise is the framework's own, drawn from a generator that the session seeds with `seed`.
    """

    name: str
    rate: float = 0.5


@dataclass(frozen=True, eq=False)
class Embedding:
    """Look up integers in weight (entries, features)."""

    name: str
    weight: Array


@dataclass(frozen=True, eq=False)
class Tanh:
    """The hyperbolic tangent."""

    name: str


@dataclass(frozen=True, eq=False)
class Relu:
    """max(x, 0), with derivative 0 at 0."""

    name: str


@dataclass(frozen=True, eq=False)
class GlobalMean:
    """Mean over every axis between the first and the last."""

    name: str


Layer = Dense | Conv | BatchNorm | Carry | Dropout | Embedding | Tanh | Relu | GlobalMean


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs (b, ...), float64 or integers, and integer targets (b,) in [0, classes)."""

    inputs: Array
    targets: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """A model as data, with batches to train it on.

    The last layer's output (b, classes) are logits; the losses are the softmax cross-entropies,
    one per sample. Adapters need only `layers`: each step is given its batch.

    Args:
        name: the problem's name.
        layers: in order of execution. Weights are float64; the adapter casts them.
        batches: the training batches, in order. Their sizes may differ.
    """

    name: str
    layers: tuple[Layer, ...]
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Base:
    """A base optimizer: the framework's own SGD, Adam or AdamW with these settings.

    Args:
        kind: "sgd", "adam" or "adamw".
        lr: learning rate; 0 is allowed.
        momentum, nesterov: of SGD.
        weight_decay: of SGD (see `Conventions`) and AdamW (decoupled).
        betas, eps: of Adam and AdamW.
    """

    kind: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        validation.choice("kind", self.kind, ("sgd", "adam", "adamw"))


@dataclass(frozen=True)
class Conventions:
    """Where frameworks differ. The reference follows the adapter; the defaults are torch's.

    Args:
        unbiased_running_variance: BatchNorm's running variance takes the unbiased batch variance
            (torch) or the biased one (Keras: False).
        decoupled_sgd_decay: SGD's weight decay is theta -= lr * decay * theta, outside the momentum
            (Keras: True) or is added to the gradient (torch: False).
        adam_eps_in_corrected_root: Adam divides by sqrt(v / (1 - beta2^t)) + eps (torch), or by
            sqrt(v) + eps with the corrections in the learning rate (Keras: False).
    """

    unbiased_running_variance: bool = True
    decoupled_sgd_decay: bool = False
    adam_eps_in_corrected_root: bool = True
