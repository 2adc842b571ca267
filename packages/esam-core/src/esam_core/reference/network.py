"""A chain of layers with one loss per sample: the model of the reference problems.

`Model` is the interface that the reference step needs; `Network` implements it, built from a
problem's layer records.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from esam_core.problem import (
    Batch,
    BatchNorm,
    Carry,
    Conv,
    Dense,
    Dropout,
    Embedding,
    GlobalMean,
    Layer,
    Relu,
    Tanh,
)
from esam_core.reference import layers as functions
from esam_core.units import Unit

__all__ = ["Evaluation", "Model", "Network"]

Array = NDArray[Any]


class Evaluation(Protocol):
    """One forward pass.

    Attributes:
        losses: (b,) losses l_i, one per sample.
    """

    losses: Array

    def gradient(self, weights: Array) -> dict[str, Array]:
        """Return the gradient of the sum of w_i l_i, by parameter name."""
        ...


class Model(Protocol):
    """The interface that the reference step needs.

    Attributes:
        parameters: theta, by name, in the order of the units. The step changes the arrays in place
            and restores them.
        buffers: running statistics and other state that `evaluate` writes, by name, changed in
            place.
        units: a record for each trainable parameter, in the same order.
        forward_state: the state that one forward passes on to the next, except running statistics:
            the random state, and what `Carry` layers hold. A copy. Assignable.
    """

    parameters: dict[str, Array]
    buffers: dict[str, Array]
    forward_state: Any

    @property
    def units(self) -> tuple[Unit, ...]:
        """The records of the trainable parameters."""
        ...

    @property
    def has_statistics(self) -> bool:
        """Whether there are running statistics."""
        ...

    def evaluate(self, batch: Batch, *, statistics: str, update: bool) -> Evaluation:
        """Return the losses of a batch at the current parameters.

        Args:
            batch: the samples.
            statistics: "batch" or "running": the statistics that BatchNorm normalises by.
            update: whether to update BatchNorm's running statistics.
        """
        ...


class _Evaluated:
    """An `Evaluation` that back-propagates when `gradient` is called."""

    def __init__(self, losses: Array, gradient: Callable[[Array], dict[str, Array]]) -> None:
        self.losses = losses
        self.gradient = gradient


def _kind(layer: Layer, role: str) -> str:
    """Return the `Unit.kind` of a layer's parameter."""
    if isinstance(layer, BatchNorm):
        return "norm"
    if isinstance(layer, Embedding):
        return "embedding"
    return role


class Network:
    """A chain of layers that ends in a softmax cross-entropy, in NumPy.

    Args:
        layers: the records, in order of execution; their arrays are copied.
        dtype: the dtype of all arrays. Default float64.
        seed: the seed of the dropout noise. Default 0.
        frozen: names of parameters that are not trained; they have no unit and no gradient.
        unbiased_running_variance: see `esam_core.problem.Conventions`.

    Example:
        >>> import numpy as np
        >>> from esam_core.problem import Batch, Dense
        >>> network = Network([Dense("head", np.zeros((3, 2)))])
        >>> batch = Batch(np.ones((4, 3)), np.array([0, 1, 0, 1]))
        >>> network.evaluate(batch).losses.round(4).tolist()
        [0.6931, 0.6931, 0.6931, 0.6931]
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        dtype: str = "float64",
        seed: int = 0,
        frozen: Sequence[str] = (),
        unbiased_running_variance: bool = True,
    ) -> None:
        self.layers = tuple(layers)
        self.dtype = np.dtype(dtype)
        self.parameters: dict[str, Array] = {}
        self.buffers: dict[str, Array] = {}
        self._frozen = frozenset(frozen)
        self._unbiased = unbiased_running_variance
        self._generator = np.random.Generator(np.random.PCG64(seed))
        units = []
        for depth, layer in enumerate(self.layers):
            for role in ("weight", "bias"):
                value = getattr(layer, role, None)
                if value is None:
                    continue
                name = f"{layer.name}.{role}"
                self.parameters[name] = np.array(value, dtype=self.dtype)
                if name not in self._frozen:
                    units.append(
                        Unit(name, value.shape, _kind(layer, role), layer.name, depth=depth)
                    )
            if isinstance(layer, Carry):
                self.buffers[f"{layer.name}.state"] = np.array(layer.state, dtype=self.dtype)
            if isinstance(layer, BatchNorm):
                self.buffers[f"{layer.name}.mean"] = np.array(layer.mean, dtype=self.dtype)
                self.buffers[f"{layer.name}.variance"] = np.array(layer.variance, dtype=self.dtype)
        self._units = tuple(units)

    @property
    def units(self) -> tuple[Unit, ...]:
        """A record for each trainable parameter."""
        return self._units

    @property
    def has_statistics(self) -> bool:
        """Whether there are running statistics."""
        return any(isinstance(layer, BatchNorm) for layer in self.layers)

    @property
    def random_state(self) -> Any:
        """The state of the dropout generator."""
        return self._generator.bit_generator.state

    @random_state.setter
    def random_state(self, state: Mapping[str, Any]) -> None:
        self._generator.bit_generator.state = state

    @property
    def forward_state(self) -> tuple[Any, dict[str, Array]]:
        """The random state, and the states of `Carry` layers."""
        names = [f"{layer.name}.state" for layer in self.layers if isinstance(layer, Carry)]
        return self.random_state, {name: self.buffers[name].copy() for name in names}

    @forward_state.setter
    def forward_state(self, state: tuple[Any, Mapping[str, Array]]) -> None:
        self.random_state, carried = state
        for name, values in carried.items():
            self.buffers[name][...] = values

    def evaluate(
        self, batch: Batch, *, statistics: str = "batch", update: bool = False
    ) -> Evaluation:
        """Return an `Evaluation` of a batch. See `Model.evaluate`."""
        x = np.asarray(batch.inputs)
        if np.issubdtype(x.dtype, np.floating):
            x = x.astype(self.dtype)
        backwards: list[functions.Backward] = []
        for layer in self.layers:
            x, backward = self._forward(layer, x, statistics, update)
            backwards.append(backward)
        losses, backward_losses = functions.softmax_cross_entropy(x, batch.targets)

        def gradient(weights: Array) -> dict[str, Array]:
            found: dict[str, Array] = {}
            dx = backward_losses(weights)
            for layer, backward in zip(reversed(self.layers), reversed(backwards), strict=True):
                dx, own = backward(dx)
                found.update({f"{layer.name}.{role}": g for role, g in own.items()})
            return {unit.name: found[unit.name] for unit in self.units}

        return _Evaluated(losses, gradient)

    def _forward(
        self, layer: Layer, x: Array, statistics: str, update: bool
    ) -> tuple[Array, functions.Backward]:
        """Run one layer."""
        weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
        theta = self.parameters
        match layer:
            case Dense():
                return functions.dense(x, theta[weight], theta.get(bias))
            case Conv():
                return functions.conv(x, theta[weight], theta.get(bias))
            case Embedding():
                return functions.embedding(x, theta[weight])
            case BatchNorm():
                return self._batchnorm(layer, x, theta[weight], theta[bias], statistics, update)
            case Carry():
                state = self.buffers[f"{layer.name}.state"]
                y, backward, new = functions.carry(x, state)
                state[...] = new
                return y, backward
            case Dropout():
                noise = self._generator.random(x.shape)
                return functions.dropout(x, layer.rate, noise)
            case Tanh():
                return functions.tanh(x)
            case Relu():
                return functions.relu(x)
            case GlobalMean():
                return functions.global_mean(x)

    def _batchnorm(
        self, layer: BatchNorm, x: Array, weight: Array, bias: Array, statistics: str, update: bool
    ) -> tuple[Array, functions.Backward]:
        """Normalise by the batch or by the running statistics, and update the latter if asked."""
        running_mean = self.buffers[f"{layer.name}.mean"]
        running_variance = self.buffers[f"{layer.name}.variance"]
        if statistics == "running":
            return functions.batchnorm_running(
                x, weight, bias, running_mean.copy(), running_variance.copy(), layer.eps
            )
        y, backward, mean, variance = functions.batchnorm(x, weight, bias, layer.eps)
        if update:
            values = x.size // x.shape[-1]
            correction = values / max(values - 1, 1) if self._unbiased else 1.0
            new = layer.momentum
            running_mean[...] = (1 - new) * running_mean + new * mean
            running_variance[...] = (1 - new) * running_variance + new * variance * correction
        return y, backward
