"""A step computed by hand from gradients, with which checks compare."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core.problem import Batch
from esam_core.reference.network import Network
from esam_core.reference.step import mean_weights

__all__ = ["mean_gradient", "peak_gradient"]

Array = NDArray[Any]


def mean_gradient(network: Network, batch: Batch) -> dict[str, Array]:
    """Return the gradient of the mean loss of a batch, by name."""
    return network.evaluate(batch).gradient(mean_weights(len(batch.targets)))


def peak_gradient(
    network: Network, batch: Batch, direction: Mapping[str, Array], rho: float
) -> dict[str, Array]:
    """Return the gradient at theta + rho d / ||d||, for a direction d by name; theta stays."""
    start = {name: theta.copy() for name, theta in network.parameters.items()}
    length = np.sqrt(sum(np.sum(d * d) for d in direction.values()))
    for name, theta in network.parameters.items():
        theta += rho * direction[name] / length
    gradient = mean_gradient(network, batch)
    for name, theta in network.parameters.items():
        theta[...] = start[name]
    return gradient
