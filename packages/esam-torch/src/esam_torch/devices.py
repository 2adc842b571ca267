"""Moving small tensors between devices without waiting."""

import torch
from torch import Tensor

__all__ = ["on_device", "on_host"]


def on_host(device: torch.device) -> bool:
    """Return whether a device is the host itself, where reading values needs no waiting."""
    return device.type == "cpu"


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host waits only if it is itself the destination.

    Without waiting, a copy *to* the host could be read before it has arrived.
    """
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=not on_host(device))
