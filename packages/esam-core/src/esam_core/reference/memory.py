"""Ascent directions that need no pass, because they come from earlier steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from esam_core import directions
from esam_core.config import ESAMConfig
from esam_core.errors import ESAMValueError
from esam_core.reference.optimizers import BaseOptimizer
from esam_core.units import Unit

__all__ = ["Memory"]

Array = NDArray[Any]


class Memory:
    """The ascent direction of `Previous` and `Momentum`.

    Args:
        config: hyperparameters.
        units: T records of the trained parameters.
        allowed: T booleans, whether the unit may be perturbed.
        base: the base optimizer, whose first moments `Momentum` reads.

    Attributes:
        previous: the gradient of the last update, by name; used by `Previous`.

    Raises:
        ESAMValueError: `ascend=Momentum()`, and the base optimizer has no first moment.
    """

    def __init__(
        self,
        config: ESAMConfig,
        units: Sequence[Unit],
        allowed: Sequence[bool],
        base: BaseOptimizer | None,
    ) -> None:
        if isinstance(config.ascend, directions.Momentum) and (base is None or not base.has_moment):
            raise ESAMValueError(
                "`ascend=Momentum()` needs a base optimizer with a first moment, such as SGD "
                f"with momentum > 0. Received: {base.base if base else None}."
            )
        self.config = config
        self.units = units
        self.allowed = allowed
        self.base = base
        self.previous: dict[str, Array] = {}

    def direction(self) -> dict[str, Array]:
        """Return the signed ascent direction, by name; empty before the first update."""
        ascend = self.config.ascend
        found: Mapping[str, Array] = {}
        if isinstance(ascend, directions.Previous):
            found = self.previous
        elif isinstance(ascend, directions.Momentum) and self.base is not None:
            found = self.base.first_moments()
        sign = getattr(ascend, "sign", 1)
        return {name: sign * g for name, g in found.items()}

    def record_update(self, gradient: Mapping[str, Array]) -> None:
        """Keep the gradient that the base optimizer used in an update, for `Previous`.

        Units that are never perturbed are left out. An update in which no unit had a gradient is
        ignored.
        """
        if not isinstance(self.config.ascend, directions.Previous) or not gradient:
            return
        kept = directions.kept_units(
            self.config.perturb, self.units, self.allowed, norm=self.config.norm
        )
        self.previous = {
            unit.name: gradient[unit.name].copy()
            for unit, keep in zip(self.units, kept, strict=True)
            if keep and unit.name in gradient
        }

    def load(self, saved: Mapping[str, Array]) -> None:
        """Load a saved `previous`, after checking that it fits this model."""
        shapes = {unit.name: unit.shape for unit in self.units}
        directions.check_saved_direction({n: g.shape for n, g in saved.items()}, shapes)
        self.previous = {name: g.copy() for name, g in saved.items()}
