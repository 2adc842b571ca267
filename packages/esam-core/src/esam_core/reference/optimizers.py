"""Base optimizers in NumPy: SGD, Adam and AdamW, as in torch or (see `Conventions`) Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core.problem import Base, Conventions

__all__ = ["BaseOptimizer"]

Array = NDArray[Any]


class BaseOptimizer:
    """A base optimizer, which updates the parameters with given gradients.

    Args:
        base: kind and settings.
        conventions: settings on which frameworks differ. Default: torch's.

    Example:
        >>> import numpy as np
        >>> from esam_core.problem import Base
        >>> theta = {"w": np.array([1.0])}
        >>> BaseOptimizer(Base("sgd", lr=0.5)).update(theta, {"w": np.array([0.2])})
        >>> theta["w"].tolist()
        [0.9]
    """

    def __init__(self, base: Base, conventions: Conventions | None = None) -> None:
        self.base = base
        self.conventions = conventions or Conventions()
        self._moments: dict[str, list[Array]] = {}
        self._steps: dict[str, int] = {}

    def update(self, parameters: Mapping[str, Array], gradients: Mapping[str, Array]) -> None:
        """Update in place all parameters that have a gradient."""
        rule = self._sgd if self.base.kind == "sgd" else self._adam
        for name, g in gradients.items():
            theta = parameters[name]
            self._steps[name] = self._steps.get(name, 0) + 1
            rule(name, theta, np.asarray(g, dtype=theta.dtype))

    def _sgd(self, name: str, theta: Array, g: Array) -> None:
        """Apply v <- mu v + g; theta <- theta - lr v, or - lr (g + mu v) (Nesterov)."""
        base = self.base
        if base.weight_decay:
            if self.conventions.decoupled_sgd_decay:
                theta -= base.lr * base.weight_decay * theta
            else:
                g = g + base.weight_decay * theta
        if base.momentum:
            (v,) = self._moments.setdefault(name, [np.zeros_like(theta)])
            v[...] = base.momentum * v + g
            g = g + base.momentum * v if base.nesterov else v
        theta -= base.lr * g

    def _adam(self, name: str, theta: Array, g: Array) -> None:
        """Apply theta <- theta - lr m / (sqrt(v) + eps), with running means m of g and v of g^2."""
        base, t = self.base, self._steps[name]
        beta1, beta2 = base.betas
        if base.kind == "adamw":
            theta -= base.lr * base.weight_decay * theta
        m, v = self._moments.setdefault(name, [np.zeros_like(theta), np.zeros_like(theta)])
        m[...] = beta1 * m + (1 - beta1) * g
        v[...] = beta2 * v + (1 - beta2) * g * g
        root = float(np.sqrt(1 - beta2**t))
        if self.conventions.adam_eps_in_corrected_root:
            denominator = np.sqrt(v) / root + base.eps
        else:
            denominator = (np.sqrt(v) + base.eps) / root
        theta -= base.lr / (1 - beta1**t) * m / denominator

    @property
    def has_moment(self) -> bool:
        """Whether the optimizer keeps a first moment: SGD with momentum does, and Adam always."""
        return self.base.kind != "sgd" or self.base.momentum > 0.0

    def first_moments(self) -> dict[str, Array]:
        """Return SGD's momentum buffers v or Adam's m by name; empty before the first update."""
        return {name: moments[0] for name, moments in self._moments.items()}

    def state(self) -> dict[str, Any]:
        """Return a copy of the moments and step counts."""
        moments = {name: [a.copy() for a in arrays] for name, arrays in self._moments.items()}
        return {"moments": moments, "steps": dict(self._steps)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` returned."""
        self._moments = {name: [a.copy() for a in old] for name, old in state["moments"].items()}
        self._steps = dict(state["steps"])
