"""The adapter of the reference, with which the kit compares backends.

python -m esam_core.conformance esam_core.conformance.numpy_adapter:adapter
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core.config import ESAMConfig
from esam_core.conformance.adapter import Fault, Observed
from esam_core.errors import ESAMRuntimeError
from esam_core.problem import Base, Batch, Conventions, Problem
from esam_core.reference.network import Evaluation, Network
from esam_core.reference.optimizers import BaseOptimizer
from esam_core.reference.step import Step, mean_weights
from esam_core.report import StepReport

__all__ = ["NumpyAdapter", "NumpySession", "WatchedNetwork", "adapter"]

Array = NDArray[Any]


class WatchedNetwork(Network):
    """A network that records the number of samples of each pass, and can fail in one."""

    def watch(self, fault: Fault | None) -> None:
        """Forget earlier passes, and set the fault."""
        self.passes: list[int] = []
        self.fault = fault

    def evaluate(
        self, batch: Batch, *, statistics: str = "batch", update: bool = False
    ) -> Evaluation:
        """Run `Network.evaluate`, unless a fault is due."""
        evaluation = super().evaluate(batch, statistics=statistics, update=update)
        self.passes.append(len(evaluation.losses))
        if self.fault is not None and self.fault.call == len(self.passes):
            raise self.fault.error
        return evaluation


class NumpySession:
    """A training run of the reference; see `Session` for the methods.

    Args:
        network: the model.
        base: the base optimizer.
        step: the ESAM step around the model, or None for the base optimizer alone.
    """

    def __init__(self, network: WatchedNetwork, base: BaseOptimizer, step: Step | None) -> None:
        self.network = network
        self.base = base
        self.esam = step
        self.left: dict[str, Array] = {}  # the gradients, like `.grad` in torch
        self.pending = False

    def step(self, batch: Batch, fault: Fault | None = None) -> Observed:
        """Run one whole training step."""
        if self.pending:
            raise ESAMRuntimeError(
                "`step` with a batch must not follow a `backward` without an update."
            )
        self.zero_gradients()
        observed = self.passes(batch, fault)
        self.apply()
        return observed

    def passes(self, batch: Batch, fault: Fault | None) -> Observed:
        """Run the passes of a step and add to the gradients."""
        self.network.watch(fault)
        if self.esam is None:
            evaluation = self.network.evaluate(batch, statistics="batch", update=True)
            gradient = evaluation.gradient(mean_weights(len(evaluation.losses)))
            report = StepReport(count=0, losses=evaluation.losses)
        else:
            gradient, report = self.esam.backward(batch)
        self.accumulate(gradient)
        return Observed(
            losses=report.losses,
            perturbed_losses=report.perturbed_losses,
            indices=report.indices,
            sample_weights=report.sample_weights,
            perturbed=report.perturbed,
            perturbation_norm=report.perturbation_norm,
            gradient_norm=report.gradient_norm,
            part=report.part,
            gradient=gradient,
            passes=tuple(self.network.passes),
        )

    def accumulate(self, gradient: Mapping[str, Array]) -> None:
        """Add to the gradients."""
        for name, g in gradient.items():
            self.left[name] = self.left[name] + g if name in self.left else g.copy()

    def backward(self, batch: Batch) -> Observed:
        """Run the passes of one step, adding to the gradients, without the update."""
        observed = self.passes(batch, None)
        self.pending = True
        return observed

    def gradients(self) -> dict[str, Array]:
        """Return copies of the gradients."""
        return {name: g.copy() for name, g in self.left.items()}

    def zero_gradients(self) -> None:
        """Reset all gradients."""
        self.left = {}
        self.pending = False

    def apply(self) -> None:
        """Run the base optimizer's update."""
        self.base.update(self.network.parameters, self.left)
        if self.esam:
            self.esam.memory.record_update(self.left)
        self.pending = False

    def weights(self) -> dict[str, Array]:
        """Return copies of all parameters."""
        return {name: theta.copy() for name, theta in self.network.parameters.items()}

    def buffers(self) -> dict[str, Array]:
        """Return copies of all running statistics and carried states."""
        return {name: values.copy() for name, values in self.network.buffers.items()}

    def trainable(self) -> dict[str, bool]:
        """Return whether each parameter is trained."""
        trained = {unit.name for unit in self.network.units}
        return {name: name in trained for name in self.network.parameters}

    def state(self) -> dict[str, Any]:
        """Return the contents of a checkpoint."""
        return {
            "weights": self.weights(),
            "buffers": self.buffers(),
            "base": self.base.state(),
            "count": self.esam.count if self.esam else 0,
            "direction": dict(self.esam.memory.previous) if self.esam else {},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state` returned."""
        for name, theta in state["weights"].items():
            self.network.parameters[name][...] = theta
        for name, values in state["buffers"].items():
            self.network.buffers[name][...] = values
        self.base.load(state["base"])
        if self.esam:
            self.esam.count = state["count"]
            self.esam.memory.load(state["direction"])

    def random_probe(self) -> Array:
        """Return the next number that the generator would draw."""
        copied = np.random.PCG64()
        copied.state = self.network.random_state
        return np.asarray(copied.random_raw(4))


class NumpyAdapter:
    """The reference as a backend.

    Args:
        conventions: the conventions of base optimizers and BatchNorm. Default: torch's.
        step: the class of the step: `Step`, or a deliberately wrong one.
        session: the class of the session.
        network: the class of the network.
    """

    name = "NumPy reference"
    dtypes: tuple[str, ...] = ("float64", "float32")
    gaps: Mapping[str, str] = {}

    def __init__(
        self,
        conventions: Conventions | None = None,
        *,
        step: type[Step] = Step,
        session: type[NumpySession] = NumpySession,
        network: type[WatchedNetwork] = WatchedNetwork,
    ) -> None:
        self.conventions = conventions or Conventions()
        self._step = step
        self._session = session
        self._network = network

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
    ) -> NumpySession:
        """Build a run; see `Adapter.session`."""
        network = self._network(
            problem.layers,
            dtype=dtype,
            seed=seed,
            frozen=tuple(frozen),
            unbiased_running_variance=self.conventions.unbiased_running_variance,
        )
        optimizer = BaseOptimizer(base, self.conventions)
        step = None
        if esam is not None:
            step = self._step(network, ESAMConfig.from_arguments(**esam), groups, optimizer)
        return self._session(network, optimizer, step)


#: The reference with torch's conventions.
adapter = NumpyAdapter()
