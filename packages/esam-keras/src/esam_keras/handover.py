"""How the optimizer distinguishes the gradients of an ESAM step from others."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from esam_core import ESAMRuntimeError

__all__ = ["StepVariables", "applying", "require_step"]


class StepVariables(list[Any]):
    """Variables, or their values, which `apply` receives with the gradients of an ESAM step.

    A loss scaler passes this list on unchanged. Gradients with any other list are an error, because
    they were not computed by ESAM's two passes.
    """


#: Whether an ESAM step's update is running. On JAX a loss scaler returns its input values from a
#: branch of a condition, in which both branches must return plain lists; on TensorFlow
#: `apply_gradients` makes a tuple of the variables.
_APPLYING: ContextVar[bool] = ContextVar("esam_keras_applying", default=False)


@contextlib.contextmanager
def applying() -> Iterator[None]:
    """Mark the gradients for updates inside this context as an ESAM step's."""
    token = _APPLYING.set(True)
    try:
        yield
    finally:
        _APPLYING.reset(token)


def require_step(variables: Any) -> None:
    """Raise if variables are not from an ESAM step.

    Raises:
        ESAMRuntimeError: they are not.
    """
    if not (isinstance(variables, StepVariables) or _APPLYING.get()):
        raise ESAMRuntimeError(
            "ESAM cannot use gradients computed elsewhere: it needs model, loss and batch for its "
            "two passes. Train with `model.compile(optimizer=ESAM(...))` and `model.fit`. In your "
            "own `train_step`, call `esam_keras.train_step(self, ...)` or "
            "`super().train_step(...)` with the arguments that it received, instead of computing "
            "and applying gradients."
        )
