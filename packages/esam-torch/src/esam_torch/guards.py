"""What a step must leave as it found it: random state, buffers, gradients, weights.

Each guard takes what it needs when it is made and puts it back when told to. None of them waits
for the device.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from esam_torch.devices import placed
from esam_torch.sharded import local

__all__ = ["Buffers", "Gradients", "RandomState", "Weights"]


class RandomState:
    """torch's global generators: the CPU's, and those of the devices that the model lives on."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in sorted(set(devices), key=str)
            if device.type not in ("cpu", "meta")
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RandomState) and all(
            torch.equal(a, b)
            for a, b in zip(
                [self._cpu, *(state for _, state in self._others)],
                [other._cpu, *(state for _, state in other._others)],
                strict=True,
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Put every generator back to where it was."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy values in few kernels: those of one device and type together."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, target in enumerate(targets):
        kinds.setdefault((target.device, target.dtype), []).append(i)
    for places in kinds.values():
        torch._foreach_copy_([targets[i] for i in places], [sources[i] for i in places])


class Buffers:
    """Copies of the buffers of all modules in training mode (BatchNorm's statistics, say).

    Copied back only *after* a backward: autograd still reads them between forward and backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name, buffer)
            for module in model.modules()
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
        ]
        # Where several elements are one place in memory (after `expand`), nothing can write.
        self._values = [b.data for _, _, b in self._places if not _overlaps(b)]
        self._copies = [torch.empty_like(values) for values in self._values]
        _copy(self._copies, self._values)

    def restore(self) -> None:
        """Copy the values back, into the same tensors, also where a forward put others there."""
        for module, name, buffer in self._places:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
        _copy(self._values, self._copies)


def _overlaps(tensor: Tensor) -> bool:
    """Say whether several elements of a tensor are one place in memory, as after `expand`."""
    return tensor.layout == torch.strided and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


class Gradients:
    """The `.grad` of parameters: copies where there is one, to be put back after a failure."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._tensors = [p.grad for p in parameters]
        self._copies = [None if g is None else g.clone() for g in self._tensors]

    def restore(self) -> None:
        """Give every parameter the tensor it had as `.grad`, with the values it had."""
        rows = zip(self._parameters, self._tensors, self._copies, strict=True)
        for parameter, tensor, copied in rows:
            if tensor is not None and copied is not None:
                if tensor.is_sparse:  # a sparse tensor's number of entries may have grown
                    tensor.data = copied
                else:  # in place: the tensor may be a view into a bucket of DDP's
                    tensor.data.copy_(copied)
            parameter.grad = tensor


class Weights:
    """Copies of the weights about to be perturbed.

    Written through `.data`, so that the version counters of autograd stay: the values come back
    bit for bit, and a graph that the user holds on to remains valid.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._weights = [local(p.data) for p in parameters]
        self._copies = [torch.empty_like(weight) for weight in self._weights]
        _copy(self._copies, self._weights)

    def add(self, perturbations: Sequence[Tensor]) -> None:
        """Go to theta + epsilon."""
        torch._foreach_add_(self._weights, list(perturbations))

    def rounded(self, perturbations: Sequence[Tensor]) -> Tensor:
        """Return the share of epsilon's nonzero entries that moved no half-precision weight.

        A 0-d float32 tensor; 0 where there are no such weights.
        """
        device = self._weights[0].device
        lost = torch.zeros((), device=device)
        all_ = torch.zeros((), device=device)
        rows = zip(self._weights, self._copies, perturbations, strict=True)
        for weight, before, epsilon in rows:
            if is_half(weight):
                nonzero = epsilon != 0
                lost += placed((nonzero & (weight == before)).sum(), device)
                all_ += placed(nonzero.sum(), device)
        return lost / all_.clamp_min(1.0)

    def restore(self) -> None:
        """Go back to theta, bit for bit."""
        _copy(self._weights, self._copies)


def is_half(tensor: Tensor) -> bool:
    """Say whether a tensor holds floating numbers of less than 32 bits."""
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


def statistics_layers(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers in training mode that use the statistics of this rank alone.

    SyncBatchNorm is not one where there are several ranks: it has theirs, and waits for them.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and not _synchronised(module)
    ]


def _synchronised(layer: nn.Module) -> bool:
    """Say whether a BatchNorm layer shares its statistics with other ranks."""
    return (
        isinstance(layer, nn.SyncBatchNorm)
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(layer.process_group) > 1
    )
