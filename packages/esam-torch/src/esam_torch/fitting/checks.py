"""Checks of the arguments of `fit`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_core.validation import choice
from esam_torch.fitting.data import Arguments
from esam_torch.fitting.measures import REPORTED, Metric, ModelLosses
from esam_torch.losses import accepts
from esam_torch.optimizer import ESAM
from esam_torch.wrappers import bare_model

__all__ = [
    "Plateau",
    "check_arguments",
    "check_objects",
    "check_scaler",
    "check_scheduler",
    "monitored_name",
    "smallest_is_best",
]

#: The scheduler that gets the loss of an epoch.
Plateau = torch.optim.lr_scheduler.ReduceLROnPlateau


def check_objects(model: Any, optimizer: Any, losses: Any) -> None:
    """Raise if an argument cannot be used for training."""
    if not isinstance(model, nn.Module):
        raise ESAMTypeError(f"`model` must be a torch.nn.Module. Received: {model!r}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ESAMTypeError(
            "`optimizer` must be an ESAM or another torch.optim.Optimizer. "
            f"Received: {optimizer!r}."
        )
    if isinstance(optimizer, ESAM) and bare_model(optimizer.model) is not bare_model(model):
        raise ESAMValueError(
            "`optimizer` must be an ESAM of `model`. Received: an ESAM of another model."
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if trained.isdisjoint(map(id, model.parameters())):
        raise ESAMValueError(
            "`optimizer` must be an optimizer of parameters of `model`. "
            f"Received: {type(optimizer).__name__} of other parameters."
        )
    if not callable(losses):
        raise ESAMTypeError(
            "`losses` must be a function of the model and a batch that returns one loss per "
            f"sample. Received: {losses!r}."
        )


def check_arguments(losses: ModelLosses, model: nn.Module, batch: Arguments) -> None:
    """Raise if `losses` does not accept the model before the batch."""
    if not accepts(losses, (model, *batch)) and accepts(losses, batch):
        raise ESAMTypeError(
            "`losses` must accept the model and the batch, because `fit` calls losses(model, "
            f"*batch). Received: a function of only {len(batch)} arguments."
        )


def check_scheduler(scheduler: Any, scheduler_step: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise if a scheduler is not one of the optimizer, or cannot step at these times."""
    choice("scheduler_step", scheduler_step, ("epoch", "batch"))
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise ESAMTypeError(
            "`scheduler` must be a learning rate scheduler of `optimizer`, with a method `step`. "
            f"Received: scheduler={scheduler!r}."
        )
    scheduled = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    if scheduled is not None:
        # Of ESAM, its base optimizer, or one of several: they share their groups.
        groups = {id(group) for group in optimizer.param_groups}
        if groups.isdisjoint(map(id, scheduled)):
            raise ESAMValueError(
                "`scheduler` must be a scheduler of `optimizer` or of its base optimizer. "
                f"Received: a {type(scheduler).__name__} of another optimizer."
            )
    if scheduler_step == "batch" and isinstance(scheduler, Plateau):
        raise ESAMValueError(
            '`scheduler_step` must be "epoch" for a ReduceLROnPlateau, which monitors the loss of '
            'an epoch. Received: "batch".'
        )


def check_scaler(optimizer: Any, precision: str, scaler: torch.amp.GradScaler | None) -> None:
    """Raise for a scaler without fp16, and for fp16 together with `on_nonfinite`."""
    if scaler is not None and precision != "fp16":
        raise ESAMValueError(
            f'`precision` must be "fp16" with `scaler`. Received: precision={precision!r}.'
        )
    if precision == "fp16" and isinstance(optimizer, ESAM):
        mode = optimizer.config.on_nonfinite
        if mode != "propagate":
            raise ESAMValueError(
                '`on_nonfinite` must be "propagate" with precision="fp16": the gradient scaler '
                "finds overflows in `.grad` and skips the update itself. "
                f"Received: on_nonfinite={mode!r}."
            )


def monitored_name(
    monitor: str | None, optimizer: Any, metrics: Mapping[str, Metric], *, evaluated: bool
) -> str:
    """Return the name of the monitored number, after checking that it can exist."""
    if monitor is None:
        return "eval_loss" if evaluated else "train_loss"
    kinds = ("train", "eval") if evaluated else ("train",)
    known = [f"{kind}_{name}" for kind in kinds for name in ("loss", *metrics)]
    if isinstance(optimizer, ESAM):  # of the other numbers in a report, none is better than another
        known += [name for name in REPORTED if name.endswith("sharpness")]
    return choice("monitor", monitor, tuple(known))


def smallest_is_best(monitored: str, mode: str | None) -> bool:
    """Return whether less is better; raise if that is unknown."""
    if mode is not None:
        return choice("monitor_mode", mode, ("min", "max")) == "min"
    if monitored.endswith(("loss", "sharpness")):
        return True
    if not monitored.endswith("accuracy"):
        raise ESAMValueError(
            '`monitor_mode` must be "min" or "max" for a metric other than an accuracy: only you '
            f"know whether less of it is better. Received: monitor={monitored!r} and "
            "monitor_mode=None."
        )
    return False
