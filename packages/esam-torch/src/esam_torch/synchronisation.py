"""Passes that ranks run on their own."""

import contextlib
from typing import Any

from torch import nn

__all__ = ["unsynchronised"]


def unsynchronised(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which DistributedDataParallel reduces nothing.

    Forward *and* backward of a pass must run inside: the forward already arms the reduction. Each
    rank climbs on its own shard of the batch (m-sharpness); ranks meet in the descent gradient.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
