"""The loop over epochs and batches."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from esam_core import ESAMTypeError, ESAMValueError, RunningMeans, StepReport
from esam_core.validation import choice, count_number
from esam_torch.fitting.data import Arguments, arguments, chosen_device, moved
from esam_torch.fitting.history import History
from esam_torch.fitting.measures import Means, Metric, ModelLosses, evaluate
from esam_torch.fitting.progress import chosen_progress
from esam_torch.losses import per_sample
from esam_torch.optimizer import ESAM
from esam_torch.units import bare_model

__all__ = ["fit"]

#: What a history shows of the steps' reports, beside losses and metrics.
REPORTED = (
    "sharpness",
    "selected_sharpness",
    "rejected_sharpness",
    "perturbation_norm",
    "gradient_norm",
    "weight_share",
    "sample_share",
)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: ModelLosses,
    loader: Iterable[Any],
    *,
    epochs: int,
    eval_loader: Iterable[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    scheduler: Any = None,
    scheduler_step: str = "epoch",
    device: torch.device | str = "auto",
    progress: bool | str = True,
    title: str = "",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train a model, with `ESAM` or with any other optimizer, through the same loop.

    Args:
        model: what is trained. It is moved to `device` and left there, in evaluation mode.
        optimizer: an `ESAM` around a base optimizer, or a base optimizer alone.
        losses: a function of the model and a batch that returns one loss a sample, a tensor of
            shape (b,), or (losses, outputs). A batch that is a tuple or a list comes as several
            arguments, `losses(model, inputs, targets)`; any other as one.
        loader: batches to train on; gone through once an epoch.
        epochs: how many, >= 1.
        eval_loader: batches to evaluate on after each epoch. Default none.
        metrics: functions of (outputs, *batch) that return one number a sample, by name, such as
            `{"accuracy": accuracy}`. They need `losses` to return (losses, outputs). Default none.
        scheduler: a learning rate scheduler of `optimizer`. Default none.
        scheduler_step: whether it steps each "epoch" (default) or each "batch".
        device: default "auto": the accelerator where there is one.
        progress: True (default): bars with rich or tqdm, whichever is installed, else a line an
            epoch; False: nothing; "rich", "tqdm", "plain": that one.
        title: written before the bars. Default "".
        on_epoch: called with each epoch's row. Default none.

    Returns:
        A `History`: for each epoch "epoch" (from 1), "learning_rate", "train_loss", "train_" and
        "eval_" of each metric, "eval_loss", "sharpness" and others of the step reports, "seconds"
        of training alone and "samples_per_second".

    Raises:
        ESAMValueError, ESAMTypeError: naming the argument, what must hold, and what came.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from esam_torch import ESAM, accuracy, fit
        >>> _ = torch.manual_seed(0)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)
        >>> def losses(model, inputs, targets):
        ...     outputs = model(inputs)
        ...     return F.cross_entropy(outputs, targets, reduction="none"), outputs
        >>> history = fit(model, optimizer, losses, loader, epochs=2, eval_loader=loader,
        ...               metrics={"accuracy": accuracy}, progress=False)
        >>> history["eval_loss"][1] < history["eval_loss"][0]
        True
    """
    _check(model, optimizer, losses)
    count_number("epochs", epochs, least=1)
    choice("scheduler_step", scheduler_step, ("epoch", "batch"))
    place = chosen_device(device)
    model.to(place)
    bound = functools.partial(losses, model)
    history = History()
    with chosen_progress(progress, epochs, title) as shown:
        for epoch in range(1, epochs + 1):
            _training_mode(model, optimizer, training=True)
            means, reports = Means(metrics or {}), RunningMeans(REPORTED)
            row = {"epoch": float(epoch), "learning_rate": float(optimizer.param_groups[0]["lr"])}
            started = time.perf_counter()
            shown.start(epoch, _length(loader))
            for batch in loader:
                inputs = arguments(moved(batch, place))
                optimizer.zero_grad()
                report = gradient(optimizer, bound, inputs)
                optimizer.step()
                if scheduler is not None and scheduler_step == "batch":
                    scheduler.step()
                means.update(report.losses, report.outputs, inputs)
                reports.update(report)
                shown.advance(report.loss)
            if not means.samples:
                raise ESAMValueError("`loader` must hold a batch in each epoch. Received: none.")
            row |= {f"train_{name}": value for name, value in means.result().items()}
            row |= reports.result()
            row["seconds"] = time.perf_counter() - started  # result() has waited for the device
            row["samples_per_second"] = means.samples / row["seconds"]
            _training_mode(model, optimizer, training=False)
            if eval_loader is not None:
                found = evaluate(model, losses, eval_loader, metrics=metrics, device=place)
                row |= {f"eval_{name}": value for name, value in found.items()}
            if scheduler is not None and scheduler_step == "epoch":
                _step_scheduler(scheduler, row)
            history.rows.append(row)
            shown.finish(row)
            if on_epoch is not None:
                on_epoch(row)
    return history


def gradient(
    optimizer: torch.optim.Optimizer, losses: Callable[..., Any], batch: Arguments
) -> StepReport:
    """Add a batch's gradient to `.grad`, by ESAM or, for any other optimizer, of the mean loss."""
    if isinstance(optimizer, ESAM):
        return optimizer.backward(losses, *batch)
    values, outputs = per_sample(losses(*batch))
    torch.autograd.backward(values.mean())
    return StepReport(count=0, losses=values.detach(), outputs=outputs)


def _check(model: Any, optimizer: Any, losses: Any) -> None:
    """Refuse what cannot be trained."""
    if not isinstance(model, nn.Module):
        raise ESAMTypeError(f"`model` must be a torch.nn.Module. Received: {model!r}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ESAMTypeError(
            "`optimizer` must be an ESAM or another torch.optim.Optimizer. "
            f"Received: {optimizer!r}."
        )
    if isinstance(optimizer, ESAM) and bare_model(optimizer.model) is not bare_model(model):
        raise ESAMValueError("`optimizer` must be an ESAM of `model`. Received: one of another.")
    if not callable(losses):
        raise ESAMTypeError(
            "`losses` must be a function of the model and a batch that returns one loss a sample. "
            f"Received: {losses!r}."
        )


def _training_mode(model: nn.Module, optimizer: Any, *, training: bool) -> None:
    """Set the mode of the model, and of optimizers that have one (schedule-free ones)."""
    model.train(training)
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def _length(loader: Any) -> int | None:
    """Return the number of batches where the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None


def _step_scheduler(scheduler: Any, row: Mapping[str, float]) -> None:
    """Step a scheduler after an epoch; one that watches a number gets the loss."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(row.get("eval_loss", row["train_loss"]))
    else:
        scheduler.step()
