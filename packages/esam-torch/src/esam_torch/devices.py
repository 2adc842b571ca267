"""The devices of a model, and moving small tensors between devices without waiting."""

import torch
from torch import Tensor, nn

__all__ = ["devices_of", "on_device", "on_host"]


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices that a model runs on: of its parameters, and of DataParallel's copies."""
    found = {p.device for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            found |= {torch.device(module.src_device_obj.type, i) for i in module.device_ids}
    return sorted(found, key=str)


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
