"""ESAM's own variables in a file: the step count, the sums for the logs, and a direction."""

from collections.abc import Sequence
from typing import Any

import keras

from esam_core.directions import check_saved_direction
from esam_keras.warning import warn_user

__all__ = ["LOG_SUMS", "load_own"]

#: The sums for the logged means, in the order of the variables.
LOG_SUMS = ("sharpness_total", "sharpness_count", "share_total", "share_count")


def load_own(own: Sequence[Any], store: Any, *, built: bool) -> None:
    """Read ESAM's own variables.

    Like Keras's optimizers, it warns and keeps their values if the file has other variables, or
    none, as if it has the weights of a model that was not compiled with an ESAM.

    Args:
        own: the variables.
        store: the saved arrays, by their place.
        built: whether the variables of a direction exist, if there are any.

    Raises:
        ESAMValueError: the direction is of another model.
    """
    always = 1 + len(LOG_SUMS)
    found = [store[str(i)] for i in range(len(store.keys()))]
    if len(found) not in (len(own), always) or any(v.shape for v in found[:always]):
        warn_user(
            f"The state of ESAM was not loaded: it has {len(own)} variables of its own"
            f"{'' if built else ' before the first step'}. Received: {len(found)} saved "
            "variables. If the file is of a model trained with ESAM, load it with "
            "`keras.saving.load_model`, or build the optimizer first."
        )
        return
    directions = list(zip(own, found, strict=False))[always:]
    check_saved_direction(
        {v.path: value.shape for v, value in directions}, {v.path: v.shape for v in own}
    )
    for variable, value in zip(own, found, strict=False):
        variable.assign(value)
    for variable in own[len(found) :]:  # the file has no direction: the next step is a base step
        variable.assign(keras.ops.zeros(variable.shape, dtype=variable.dtype))
