"""The scope of a pass, in which variables have given values."""

from collections.abc import Callable
from typing import Any

import keras

__all__ = ["PassScope"]

Tensor = Any


class PassScope(keras.StatelessScope):
    """A `keras.StatelessScope` that uses values unchanged, and records assignments.

    Keras's constructor converts and checks each value, which costs more than a small layer does.

    Args:
        values: the variables' values in the scope, by the variables' ids.
        assigned: converts a value assigned to a variable, given both; None keeps it unchanged.
    """

    def __init__(
        self,
        values: dict[int, Tensor],
        assigned: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(collect_losses=True)
        self.state_mapping = values
        self._assigned = assigned
        #: Assigned variables without a value in the scope: Keras does not track all variables.
        self.strangers: list[Any] = []

    def add_update(self, update: tuple[Any, Tensor]) -> None:
        """Record a value assigned to a variable in the scope."""
        variable, value = update
        if id(variable) not in self.state_mapping:
            self.strangers.append(variable)
        if self._assigned is not None:
            value = self._assigned(variable, value)
        self.state_mapping[id(variable)] = value
