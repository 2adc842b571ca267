"""What Keras passes over on backends that it cannot distribute on."""

import keras

from esam_core import ESAMRuntimeError

__all__ = ["refuse_distribution"]


def refuse_distribution() -> None:
    """Raise where a distribution is set that would have no effect."""
    found = keras.distribution.distribution()
    if found is not None:
        raise ESAMRuntimeError(
            "`keras.distribution` works on the JAX backend alone; here the model would train on "
            "one device. Use KERAS_BACKEND=jax, or esam-torch with DistributedDataParallel. "
            f"Received: {found!r}."
        )
