"""Training steps of each family of methods, with one interface."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.methods.registry import Method
from esam_torch import ESAM, Rows, StepReport

__all__ = ["Losses", "Stepper", "make_stepper"]

#: One loss per sample: shape (b,).
Losses = Callable[[Tensor, Tensor], Tensor]


class Stepper(Protocol):
    """Runs training steps.

    Attributes:
        base: the optimizer whose learning rate is set.
        averaged: the model to test instead of the trained one, or None.
    """

    base: torch.optim.Optimizer
    averaged: nn.Module | None

    def step(self, losses: Losses, x: Tensor, y: Tensor) -> StepReport | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _BaseStepper:
    """The base optimizer alone."""

    averaged: nn.Module | None = None

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base

    def step(self, losses: Losses, x: Tensor, y: Tensor) -> None:
        self.base.zero_grad()
        losses(x, y).mean().backward()
        self.base.step()

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)


class _AveragingStepper(_BaseStepper):
    """The base optimizer, with an exponential moving average of the weights to test.

    BatchNorm's running statistics are averaged with the weights (`use_buffers`), because
    recomputing them in another pass over the data would cost a third of an epoch.
    """

    averaged: nn.Module

    def __init__(self, base: torch.optim.Optimizer, model: nn.Module, share: float) -> None:
        super().__init__(base)
        self._model = model
        average = get_ema_multi_avg_fn(1 - share)
        self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.averaged = self._average.module

    def step(self, losses: Losses, x: Tensor, y: Tensor) -> None:
        super().step(losses, x, y)
        self._average.update_parameters(self._model)

    def state_dict(self) -> dict[str, Any]:
        return {"base": super().state_dict(), "averaged": self._average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["base"])
        self._average.load_state_dict(state["averaged"])


class _ESAMStepper:
    """All configurations of esam-torch, including SAM."""

    averaged: nn.Module | None = None

    def __init__(self, optimizer: ESAM, m: int | None) -> None:
        self.optimizer = optimizer
        self.base = optimizer.base_optimizer
        self._m = m

    def step(self, losses: Losses, x: Tensor, y: Tensor) -> StepReport:
        if self._m is None or self._m >= len(y):
            # Marked, so that no step has to find where the samples are.
            return self.optimizer.step(losses, Rows(x), Rows(y))
        # m-sharpness: each part of the batch has its own perturbation; gradients are averaged.
        self.optimizer.zero_grad()
        for part_x, part_y in zip(x.split(self._m), y.split(self._m), strict=True):
            share = len(part_y) / len(y)
            report = self.optimizer.backward(
                lambda a, b, share=share: losses(a, b) * share, Rows(part_x), Rows(part_y)
            )
        self.optimizer.step()
        return report

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class _PeerStepper:
    """SAM of pytorch-optimizer, the most widely used pip-installable implementation."""

    averaged: nn.Module | None = None

    def __init__(self, base: torch.optim.SGD, rho: float, *, adaptive: bool) -> None:
        from pytorch_optimizer import SAM  # optional: needed only by this method

        group = {k: v for k, v in base.param_groups[0].items() if k != "params"}
        options = {k: group[k] for k in ("lr", "momentum", "weight_decay", "nesterov")}
        parameters = [p for g in base.param_groups for p in g["params"]]
        self.optimizer = SAM(parameters, torch.optim.SGD, rho=rho, adaptive=adaptive, **options)
        self.base = self.optimizer.base_optimizer

    def step(self, losses: Losses, x: Tensor, y: Tensor) -> None:
        def closure() -> None:
            self.optimizer.zero_grad()
            losses(x, y).mean().backward()

        closure()
        self.optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)


def make_stepper(
    method: Method,
    base: torch.optim.Optimizer,
    model: nn.Module,
    *,
    model_name: str,
    rho: float,
    beta: float = 0.6,
    gamma: float = 0.5,
    ema: float = 0.02,
    steps: int,
    seed: int = 0,
    m: int | None = None,
    parts: int = 1,
) -> Stepper:
    """Return the object that runs the steps of a method.

    Args:
        method: the method.
        base: the base optimizer of the model's parameters; SGD for "peer".
        model: the model that `losses` calls.
        model_name: its key in `MODELS`, for the blocks at which suffixes start.
        rho: the radius; the method's own radius takes precedence.
        beta: for random masks.
        gamma: for selectors.
        ema: share of the new weights in the average, in (0, 1]; for "average".
        steps: number of steps of the whole run, for schedules.
        seed: the seed of masks and selections.
        m: samples per perturbation; None is the batch. For "esam".
        parts: number of such parts in a batch; each of them counts as a step.
    """
    radius = rho if method.rho is None else method.rho
    if method.family == "base":
        return _BaseStepper(base)
    if method.family == "average":
        return _AveragingStepper(base, model, ema)
    if method.family == "peer":
        if not isinstance(base, torch.optim.SGD):
            raise TypeError(f"{method.title} must have SGD as its base. Received: {base!r}.")
        return _PeerStepper(base, radius, adaptive=method.adaptive)
    if method.budget is not None:
        optimizer = ESAM(base, model, rho=radius, budget=method.budget, seed=seed)
        return _ESAMStepper(optimizer, m)
    sampler = method.schedule.wrap(method.perturb(model_name, beta), steps * parts)
    return _ESAMStepper(
        ESAM(
            base,
            model,
            rho=radius,
            perturb=sampler,  # type: ignore[arg-type]
            select=method.select(gamma),  # type: ignore[arg-type]
            ascend=method.ascend,
            adaptive=method.adaptive,
            norm=method.norm,
            seed=seed,
        ),
        m,
    )
