"""The devices of a model, and moving small tensors between devices without waiting."""

import torch
from torch import Tensor, nn

from esam_torch.compat import DEFAULT_DEVICE_IS_KNOWN

__all__ = ["copies_ahead", "default_device", "devices_of", "on_device", "on_host", "widest"]


def default_device() -> torch.device:
    """Return the device on which torch creates tensors if none is given."""
    # The former dispatches no operation.
    return torch.get_default_device() if DEFAULT_DEVICE_IS_KNOWN else torch.empty(0).device


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


def copies_ahead(device: torch.device) -> bool:
    """Return whether the host can go on before its copy to a device has finished.

    A copy *to* the host could be read before it has arrived. To MPS, memory of the host that is
    freed or written too early could be copied.
    """
    return device.type not in ("cpu", "mps")


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting where that is safe."""
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=copies_ahead(device))


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 if the device has no float64."""
    if device.type == "xpu":
        whole = bool(torch.xpu.get_device_properties(device).has_fp64)
    else:
        whole = device.type != "mps"
    return torch.float64 if whole else torch.float32
