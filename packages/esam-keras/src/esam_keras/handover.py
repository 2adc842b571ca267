"""How the gradients of an ESAM step reach the optimizer, and no others do."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from esam_core import ESAMRuntimeError

__all__ = ["OfAStep", "applying", "require_step"]


class OfAStep(list[Any]):
    """Variables, or their values, that `apply` gets with the descent gradients of an ESAM step.

    A loss scaler hands them on as they are. Gradients that come with any other list are refused:
    they were not made by ESAM's two passes.
    """


#: Whether a step's update is being made: on JAX a loss scaler returns the values that it was given
#: from a branch of a condition, where both branches must return plain lists.
_APPLYING: ContextVar[bool] = ContextVar("esam_keras_applying", default=False)


@contextlib.contextmanager
def applying() -> Iterator[None]:
    """Let `stateless_apply` know, while this lasts, that the gradients are an ESAM step's."""
    token = _APPLYING.set(True)
    try:
        yield
    finally:
        _APPLYING.reset(token)


def require_step(variables: Any) -> None:
    """Raise unless variables come from an ESAM step.

    Raises:
        ESAMRuntimeError: they do not.
    """
    if not (isinstance(variables, OfAStep) or _APPLYING.get()):
        raise ESAMRuntimeError(
            "ESAM was handed gradients, and makes its own: it needs model, loss and batch for two "
            "passes. Train with `model.compile(optimizer=ESAM(...))` and `model.fit`. In a "
            "`train_step` of your own, call `esam_keras.train_step(self, ...)` or "
            "`super().train_step(...)` with the arguments that it received, instead of computing "
            "and applying gradients."
        )
