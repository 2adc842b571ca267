"""The adapter of esam-torch for the conformance kit.

python -m esam_core.conformance esam_torch.conformance:adapter
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from esam_core import ESAMRuntimeError, StepReport
from esam_core.conformance.adapter import Fault, Observed
from esam_core.problem import (
    Base,
    Batch,
    BatchNorm,
    Carry,
    Conv,
    Conventions,
    Dense,
    Dropout,
    Embedding,
    GlobalMean,
    Layer,
    Problem,
    Tanh,
)
from esam_torch.marks import Rows
from esam_torch.optimizer import ESAM

__all__ = ["TorchAdapter", "TorchSession", "adapter"]

Array = NDArray[Any]

#: The kit's names of the buffers that forwards write, by torch's names.
_WRITTEN = {"running_mean": "mean", "running_var": "variance", "state": "state"}


class _GlobalMean(nn.Module):
    """Mean over every axis except those of the samples and the features, in torch's layout."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class _Carry(nn.Module):
    """Adds a buffer to its input; each forward moves it halfway to the mean of the input."""

    state: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.state
        self.state = (self.state + x.detach().mean(0)) / 2
        return y


def _module(layer: Layer, images: bool) -> nn.Module:
    """Return a layer of the kit as a torch module in float64, with the layer's weights."""
    if isinstance(layer, Dense):
        fan_in, fan_out = layer.weight.shape
        dense = nn.Linear(fan_in, fan_out, bias=layer.bias is not None)
        return _fill(dense, weight=layer.weight.T, bias=layer.bias)
    if isinstance(layer, Conv):
        height, width, c_in, c_out = layer.weight.shape
        convolution = nn.Conv2d(c_in, c_out, (height, width), bias=layer.bias is not None)
        return _fill(convolution, weight=layer.weight.transpose(3, 2, 0, 1), bias=layer.bias)
    if isinstance(layer, BatchNorm):
        kind = nn.BatchNorm2d if images else nn.BatchNorm1d
        norm = kind(len(layer.weight), eps=layer.eps, momentum=layer.momentum)
        return _fill(
            norm,
            weight=layer.weight,
            bias=layer.bias,
            running_mean=layer.mean,
            running_var=layer.variance,
        )
    if isinstance(layer, Carry):
        return _fill(_Carry(len(layer.state)), state=layer.state)
    if isinstance(layer, Embedding):
        return _fill(nn.Embedding(*layer.weight.shape), weight=layer.weight)
    if isinstance(layer, Dropout):
        return nn.Dropout(layer.rate)
    if isinstance(layer, GlobalMean):
        return _GlobalMean()
    return nn.Tanh() if isinstance(layer, Tanh) else nn.ReLU()


def _fill(module: nn.Module, **arrays: Array | None) -> nn.Module:
    """Convert a module to float64, set its parameters and buffers, and return it."""
    module.double()
    for name, array in arrays.items():
        if array is not None:
            getattr(module, name).data.copy_(torch.from_numpy(np.array(array, dtype=np.float64)))
    return module


def _array(tensor: Tensor) -> Array:
    """Return a copy of a tensor in the kit's layout: outputs last."""
    values = tensor.detach().cpu().numpy().copy()
    if values.ndim == 4:
        return np.asarray(values.transpose(2, 3, 1, 0))
    return np.asarray(values)


class TorchSession:
    """A training run; see `esam_core.conformance.adapter.Session` for the methods.

    torch's random generators are global, and the kit alternates between several runs, so each run
    keeps its own random state.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        esam: Mapping[str, Any] | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self.model = model
        self.base = base
        self.esam = None if esam is None else ESAM(base, model, **esam)
        self.dtype = dtype
        self.device = device
        self.passes: list[int] = []
        self.fault: Fault | None = None
        self.generators = torch.Generator().manual_seed(seed).get_state()
        self.device_generators: Tensor | None = None
        if device.type != "cpu":
            self.device_generators = torch.Generator(device).manual_seed(seed).get_state()

    @contextmanager
    def own_generators(self) -> Iterator[None]:
        """Use this run's random state inside the context."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.generators)
        module: Any = None
        if self.device_generators is not None:
            module = torch.get_device_module(self.device)
            outer_device = module.get_rng_state(self.device)
            module.set_rng_state(self.device_generators, self.device)
        try:
            yield
        finally:
            self.generators = torch.get_rng_state()
            torch.set_rng_state(outer)
            if module is not None:
                self.device_generators = module.get_rng_state(self.device)
                module.set_rng_state(outer_device, self.device)

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the losses; raise or return bad values if the kit asks for a fault."""
        values = F.cross_entropy(self.model(inputs), targets, reduction="none")
        self.passes.append(len(targets))
        if self.fault is not None and self.fault.call == len(self.passes):
            raise self.fault.error
        return values

    def find_blocks(self, batch: Batch) -> None:
        """Run the forward that finds the blocks, which is not a pass of a step."""
        if self.esam is not None:
            self.fault = None
            with suppress(ESAMRuntimeError):  # there is no plan without a budget
                self.esam.plan(self.losses, *self.rows(batch))

    def tensors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a batch as tensors in torch's layout."""
        inputs = torch.from_numpy(np.array(batch.inputs)).to(self.device)
        if inputs.dim() == 4:
            inputs = inputs.permute(0, 3, 1, 2).contiguous()
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        return inputs, torch.from_numpy(np.array(batch.targets)).to(self.device)

    def rows(self, batch: Batch) -> tuple[Rows, Rows]:
        """Return a batch for an `ESAM`, which runs no forward to count or compare its samples."""
        inputs, targets = self.tensors(batch)
        return Rows(inputs), Rows(targets)

    def step(self, batch: Batch, fault: Fault | None = None) -> Observed:
        """Run one whole training step."""
        self.find_blocks(batch)
        self.passes, self.fault = [], fault
        with self.own_generators():
            if self.esam is not None:
                return self.observe(self.esam.step(self.losses, *self.rows(batch)))
            self.base.zero_grad()
            values = self.losses(*self.tensors(batch))
            torch.autograd.backward(values.mean())
            self.base.step()
            return self.observe(StepReport(count=0, losses=values.detach()))

    def backward(self, batch: Batch) -> Observed:
        """Run the passes of one step, adding to the gradients, without the update."""
        self.find_blocks(batch)
        self.passes, self.fault = [], None
        before = self.gradients()
        with self.own_generators():
            if self.esam is None:
                values = self.losses(*self.tensors(batch))
                torch.autograd.backward(values.mean())
                report = StepReport(count=0, losses=values.detach())
            else:
                report = self.esam.backward(self.losses, *self.rows(batch))
        return self.observe(report, before)

    def observe(self, report: StepReport, before: Mapping[str, Array] | None = None) -> Observed:
        """Return a report and the gradients as arrays."""

        def show(tensor: Tensor | None) -> Array | None:
            return None if tensor is None else tensor.cpu().numpy().copy()

        earlier = before or {}
        return Observed(
            losses=show(report.losses),
            perturbed_losses=show(report.perturbed_losses),
            indices=show(report.indices),
            sample_weights=show(report.sample_weights),
            perturbed=report.perturbed,
            perturbation_norm=float(report.perturbation_norm),
            gradient_norm=None if report.gradient_norm is None else float(report.gradient_norm),
            part=show(report.part),
            gradient={n: g - earlier.get(n, 0.0) for n, g in self.gradients().items()},
            passes=tuple(self.passes),
        )

    def weights(self) -> dict[str, Array]:
        """Return copies of all parameters."""
        return {name: self.orient(name, p) for name, p in self.model.named_parameters()}

    def orient(self, name: str, tensor: Tensor) -> Array:
        """Return a parameter, or its gradient, in the kit's layout."""
        dense = isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        return _array(tensor.T if dense and tensor.dim() == 2 else tensor)

    def buffers(self) -> dict[str, Array]:
        """Return copies of all running statistics and carried states."""
        found = {}
        for name, buffer in self.model.named_buffers():
            layer, _, leaf = name.rpartition(".")
            if leaf in _WRITTEN:
                found[f"{layer}.{_WRITTEN[leaf]}"] = _array(buffer)
        return found

    def trainable(self) -> dict[str, bool]:
        """Return whether each parameter is trained."""
        return {name: p.requires_grad for name, p in self.model.named_parameters()}

    def gradients(self) -> dict[str, Array]:
        """Return copies of the gradients; absent ones left out."""
        return {
            name: self.orient(name, p.grad)
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }

    def zero_gradients(self) -> None:
        """Reset all gradients."""
        (self.esam or self.base).zero_grad()

    def apply(self) -> None:
        """Run the base optimizer's update."""
        (self.esam or self.base).step()

    def state(self) -> Any:
        """Return the contents of a checkpoint."""
        optimizer = self.esam or self.base
        return copy.deepcopy((self.model.state_dict(), optimizer.state_dict(), self.generators))

    def load(self, state: Any) -> None:
        """Restore a state that `state` returned."""
        weights, optimizer, self.generators = copy.deepcopy(state)
        self.model.load_state_dict(weights)
        (self.esam or self.base).load_state_dict(optimizer)

    def random_probe(self) -> Array:
        """Return the state of this run's generators."""
        states = [self.generators]
        if self.device_generators is not None:
            states.append(self.device_generators)
        return np.asarray(torch.cat(states).numpy()).copy()


class TorchAdapter:
    """esam-torch as a backend of the kit.

    Args:
        device: where models and batches live. Default "cpu".
    """

    dtypes: tuple[str, ...] = ("float64", "float32")
    conventions = Conventions()
    gaps: Mapping[str, str] = {}

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.name = f"esam-torch on {device}"

    def session(
        self,
        problem: Problem,
        base: Base,
        esam: Mapping[str, Any] | None,
        *,
        dtype: str,
        frozen: Collection[str] = (),
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> TorchSession:
        """Build a run: see `esam_core.conformance.adapter.Adapter.session`."""
        images = any(isinstance(layer, Conv) for layer in problem.layers)
        model = nn.Sequential()
        for layer in problem.layers:
            model.add_module(layer.name, _module(layer, images))
        native = getattr(torch, dtype)
        model.to(self.device, native)
        own = groups or {}
        common: list[Tensor] = []
        parameter_groups: list[dict[str, Any]] = []
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
            elif name in own:
                options = {f"esam_{key}": value for key, value in own[name].items()}
                parameter_groups.append({"params": [parameter], **options})
            else:
                common.append(parameter)
        if common:
            parameter_groups.insert(0, {"params": common})
        return TorchSession(
            model,
            _base(base, parameter_groups),
            esam,
            dtype=native,
            device=self.device,
            seed=seed,
        )


def _base(base: Base, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's own optimizer with the kit's settings."""
    if base.kind == "sgd":
        return torch.optim.SGD(
            groups,
            lr=base.lr,
            momentum=base.momentum,
            nesterov=base.nesterov,
            weight_decay=base.weight_decay,
        )
    if base.kind == "adam":
        return torch.optim.Adam(groups, lr=base.lr, betas=base.betas, eps=base.eps)
    return torch.optim.AdamW(
        groups, lr=base.lr, betas=base.betas, eps=base.eps, weight_decay=base.weight_decay
    )


#: esam-torch on the CPU.
adapter = TorchAdapter()
