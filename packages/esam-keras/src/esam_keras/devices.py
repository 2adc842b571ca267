"""Where the step counter is: reading and writing it must not wait for an accelerator."""

from typing import Any

import keras

__all__ = ["on_the_host"]


def on_the_host() -> Any:
    """Return the scope for creating and writing the counter on the host.

    On JAX the counter is part of the state, which jit requires on one device.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return keras.name_scope("esam")
    return keras.device("cpu:0" if backend == "tensorflow" else "cpu")
