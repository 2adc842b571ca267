"""The loop over epochs and batches."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esam_core import ESAMRuntimeError, ESAMValueError
from esam_core.validation import choice, count_number, positive
from esam_torch.fitting.boards import board
from esam_torch.fitting.checkpoints import Checkpoints, Place
from esam_torch.fitting.checks import (
    Plateau,
    check_objects,
    check_scaler,
    check_scheduler,
    monitored_name,
    smallest_is_best,
)
from esam_torch.fitting.data import arguments, choose_device, groups_of, move_batch
from esam_torch.fitting.history import History
from esam_torch.fitting.measures import (
    REPORTED,
    Means,
    Metric,
    ModelLosses,
    check_metrics,
    evaluate,
)
from esam_torch.fitting.progress import Silent, choose_progress
from esam_torch.fitting.randomness import parts_of
from esam_torch.fitting.ranks import (
    broadcast_buffers,
    join_processes,
    replicate,
    split,
    sum_over_ranks,
    world,
)
from esam_torch.fitting.settings import check_data, data_of, trained
from esam_torch.fitting.update import PRECISIONS, Update, with_precision
from esam_torch.optimizer import ESAM

__all__ = ["fit"]


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
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    monitor: str | None = None,
    monitor_mode: str | None = None,
    save_every: int | None = None,
    tensorboard: str | Path | None = None,
    progress: bool | str = True,
    title: str = "",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train a model, with `ESAM` or with any other optimizer, through the same loop.

    Under torchrun, every process trains a replica with DistributedDataParallel on its share of
    `loader`, and the means are over all processes. A DataLoader is split, in an order that rank 0
    draws; any other iterable, and one with a sampler of its own, is the process's share.

    Args:
        model: the model to train. It is moved to `device` and left there, in evaluation mode. In
            each epoch all of its modules are in training mode; one that must not be, such as a
            frozen BatchNorm, overrides `train`.
        optimizer: an `ESAM`, or any other optimizer.
        losses: a function of the model and a batch that returns one loss per sample, a tensor of
            shape (b,), or (losses, outputs). A tuple or list is passed as several arguments,
            `losses(model, inputs, targets)`; any other batch as one.
        loader: the training batches; iterated over once per epoch.
        epochs: the number of epochs, >= 1.
        eval_loader: the batches to evaluate on after each epoch. Default none.
        metrics: functions of (outputs, *batch) that return one number per sample, by name, such as
            `{"accuracy": accuracy}`. They need `losses` to return (losses, outputs). The names of
            other numbers, "loss" and the report's, are an error. Default none.
        scheduler: a learning rate scheduler of `optimizer`. Default none.
        scheduler_step: whether it steps after each "epoch" (default) or each "batch" (update).
        device: where to train. Default "auto": the accelerator if there is one, else the CPU.
        precision: the autocast precision of `losses`: "fp32" (default), "bf16", or "fp16", which
            uses a gradient scaler.
        scaler: the gradient scaler of "fp16". Default: a new one.
        accumulate: number of batches whose gradients are averaged for one update, >= 1. A batch
            that ESAM skips (`on_nonfinite="skip"`) is left out of the average and of the epoch's
            means; if all are skipped, there is no update. Default 1.
        clip_norm: maximum norm of the gradient, > 0. Default none.
        clip_value: maximum absolute value in the gradient, > 0. Default none.
        folder: where "last.pt", "best.pt", "history.csv" and "history.json" are written after each
            epoch. Default none.
        resume: whether to resume from "last.pt" if `folder` contains it, with the same settings of
            `optimizer` and `scheduler`. The final weights are bitwise identical to those of an
            uninterrupted run, if the other arguments are the same and random numbers come from the
            global generators of torch, Python and NumPy or from the loaders' own `generator`.
            Other generators (of a data set, a sampler or a model), and those of a loader's
            `persistent_workers`, are not saved. Default False: the files of an earlier run in
            `folder` are renamed ("last.pt.old"), and deleted when this run writes "last.pt".
        monitor: the number whose best value determines "best.pt": a loss, a metric or a sharpness.
            Epochs without this number, or with NaN, are ignored. Default "eval_loss", or
            "train_loss" without `eval_loader`.
        monitor_mode: "min" if its smallest value is best, "max" if its largest is. Default: "min"
            for a loss or sharpness, "max" for an accuracy; another metric needs it.
        save_every: write "last.pt" after every so many updates within an epoch, >= 1. Default none.
        tensorboard: folder for TensorBoard's scalars. Default none.
        progress: True (default): a progress bar by rich or tqdm if one is installed, else one line
            per epoch. False: nothing. Or one of "rich", "tqdm" and "plain".
        title: text before the progress bar. Default "".
        on_epoch: called with each epoch's row, in every process. If it raises an exception,
            training ends in all processes after the epoch's checkpoint is written. Default none.

    Returns:
        A `History`: for each epoch "epoch" (from 1), "learning_rate", "train_loss", "train_..." and
        "eval_..." for each metric, "eval_loss", "sharpness" and other fields of the step reports,
        "seconds" (training only) and "samples_per_second". "train_loss" is the mean of the losses
        before each update. Where steps do not compute these, it is with `Part` the mean over the
        samples in the part, and with `Previous` and `Momentum` the mean of the descent pass, at the
        perturbed weights.

    Raises:
        ESAMValueError, ESAMTypeError: an argument is invalid; the message names it, the requirement
            and the value received.

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
    check_objects(model, optimizer, losses)
    check_scheduler(scheduler, scheduler_step, optimizer)
    count_number("epochs", epochs, least=1)
    count_number("accumulate", accumulate, least=1)
    measured = check_metrics(metrics)
    choice("precision", precision, PRECISIONS)
    check_scaler(optimizer, precision, scaler)
    for name, bound in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if bound is not None:
            positive(name, bound)
    if save_every is not None:
        count_number("save_every", save_every, least=1)
    given = (save_every, monitor, monitor_mode)
    if folder is None and (resume or any(value is not None for value in given)):
        raise ESAMValueError(
            "`folder` must be given with `resume`, `save_every`, `monitor` and `monitor_mode`: it "
            "is the folder of the checkpoints. Received: folder=None."
        )
    watched = monitored_name(monitor, optimizer, measured, evaluated=eval_loader is not None)
    smallest = smallest_is_best(watched, monitor_mode)
    with contextlib.ExitStack() as stack:
        place = join_processes(choose_device(device))
        model.to(place)
        called = stack.enter_context(_wrap(model, optimizer, place))
        if precision == "fp16" and scaler is None:
            scaler = torch.amp.GradScaler(place.type)
        first_rank = world()[0] == 0
        shown = stack.enter_context(
            choose_progress(progress if first_rank else False, epochs, title)
        )
        write = stack.enter_context(board(tensorboard if first_rank else None))
        loader = split(loader, training=True)
        eval_loader = None if eval_loader is None else split(eval_loader, training=False)
        update = Update(called, optimizer, losses, place, precision, scaler, clip_norm, clip_value)
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        loaders = [loader] if eval_loader is None else [loader, eval_loader]
        checkpoints = Checkpoints(folder, model, parts, loaders, place, watched, smallest=smallest)
        history = checkpoints.history
        each_batch = scheduler if scheduler_step == "batch" else None
        training = _Training(
            update,
            loader,
            accumulate,
            each_batch,
            checkpoints,
            shown,
            save_every,
            Means(measured, place),
        )
        resumed = None
        if resume:
            resumed = checkpoints.load(training.means)
        else:
            checkpoints.begin()
        if resumed is not None and not resumed[0].updates:
            checkpoints.save_results()  # a kill may have come between the files
        start, now = resumed if resumed is not None else (Place(), None)
        if now is not None:
            checkpoints.load_random_state(start.random)
        trained.add(optimizer)
        for epoch in range(start.epoch, epochs + 1):
            _mode(called, optimizer, training=True)
            rate = start.rate if start.updates else _rate(optimizer)
            row = {"epoch": float(epoch), "learning_rate": rate}
            row |= training.epoch(dataclasses.replace(start, epoch=epoch, rate=rate), now)
            start, now = Place(), None
            _mode(called, optimizer, training=False)
            broadcast_buffers(model)
            if eval_loader is not None:
                found = evaluate(
                    *(model, with_precision(losses, update), eval_loader),
                    metrics=measured,
                    device=place,
                    everywhere=True,
                )
                row |= {f"eval_{name}": value for name, value in found.items()}
            if scheduler is not None and scheduler_step == "epoch":
                _step_scheduler(scheduler, row)
            history.rows.append(row)
            shown.finish(row)
            write(row)
            kept = (checkpoints, epoch, training.means, place)  # with what on_epoch has changed
            try:
                if on_epoch is not None:
                    on_epoch(row)
            except BaseException:
                _save_together(*kept, ending=True)
                raise
            ended = _save_together(*kept, ending=False)
            if ended:  # this process would wait for the others forever
                raise ESAMRuntimeError(
                    "`on_epoch` must end training in every process or in none. Received: an "
                    f"exception in {ended} of {world()[1]} processes, so training ends in all of "
                    "them. The epoch's checkpoint is written."
                )
        _mode(called, optimizer, training=False)
    return history


@dataclasses.dataclass
class _Training:
    """The training part of the loop, epoch by epoch, without evaluation.

    Args:
        update: runs an update on a group of batches.
        loader: this process's batches.
        accumulate: the number of batches in a group.
        scheduler: the scheduler to step after each update, or None.
        checkpoints: writes the state.
        shown: shows the progress.
        save_every: the number of updates between checkpoints within an epoch, or None.
        means: collects the measurements.
    """

    update: Update
    loader: Any
    accumulate: int
    scheduler: Any
    checkpoints: Checkpoints
    shown: Silent
    save_every: int | None
    means: Means

    def epoch(self, start: Place, now: Mapping[str, Any] | None) -> dict[str, float]:
        """Train for one epoch and return the measurements.

        Args:
            start: the epoch, and its updates that were completed before an interruption.
            now: the random state after those updates, or None if there were none.
        """
        epoch, done = start.epoch, start.updates
        for part in parts_of(self.loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        random, data = self.checkpoints.random_state(), data_of(self.loader, self.accumulate)
        if done:
            check_data(start.data, data)
        started, samples = time.perf_counter(), start.samples
        self.shown.start(epoch, data["`len(loader)`"])
        number = 0
        for number, group in enumerate(groups_of(self.loader, self.accumulate), 1):
            self.shown.advance(len(group))
            if number <= done:
                if number == done and now is not None:  # before the next batch is drawn
                    self.checkpoints.load_random_state(now)
                    started = time.perf_counter() - start.seconds  # without skipping batches
                continue
            batches = [arguments(move_batch(batch, self.update.device)) for batch in group]
            reports, stepped = self.update(batches)
            if stepped and self.scheduler is not None:
                self.scheduler.step()
            for report in reports:
                if not report.skipped:  # one NaN would make the mean of the epoch NaN
                    self.means.add_step(report)
                samples += report.batch_size or 0
            self.shown.loss(reports[-1])
            if self.save_every is not None and number % self.save_every == 0:
                seconds = time.perf_counter() - started
                place = Place(epoch, number, random, start.rate, data, seconds, samples)
                self.checkpoints.save(place, self.means)
        if number == 0:
            raise ESAMValueError("`loader` must yield a batch in each epoch. Received: none.")
        if number < done:
            raise ESAMValueError(
                f"`loader` must yield the batches of the {done} updates of this epoch that the "
                f"checkpoint contains. Received: batches of {number} updates."
            )
        measured = self.means.result(everywhere=True)
        named = {
            name if name in REPORTED else f"train_{name}": value for name, value in measured.items()
        }
        self.means.reset()
        seconds = time.perf_counter() - started  # result() has waited for the device
        total = sum_over_ranks([float(samples)], self.update.device)[0]
        named.setdefault("train_loss", float("nan"))  # every step was skipped
        return {**named, "seconds": seconds, "samples_per_second": total / seconds}


@contextlib.contextmanager
def _wrap(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[nn.Module]:
    """Yield the model to call, replicated if there are other ranks."""
    called = replicate(model, device)
    if not isinstance(optimizer, ESAM) or called is model:
        yield called
        return
    own, optimizer.model = optimizer.model, called
    try:
        yield called
    finally:
        optimizer.model = own


def _save_together(
    checkpoints: Checkpoints, epoch: int, means: Means, device: torch.device, *, ending: bool
) -> int:
    """Write an epoch's checkpoint, and return how many processes end training after it.

    Args:
        checkpoints: writes the state.
        epoch: the epoch.
        means: the measurements.
        device: the device on which the processes communicate.
        ending: whether this process ends.
    """
    count = int(sum_over_ranks([float(ending)], device)[0])
    checkpoints.save_after(epoch, means)
    if count:
        sum_over_ranks([0.0], device)  # torchrun ends rank 0 too, which may still be writing
    return count


def _mode(model: nn.Module, optimizer: Any, *, training: bool) -> None:
    """Set the mode of the model, and of the optimizer if it has one (schedule-free optimizers)."""
    model.train(training)
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def _rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the first group; NaN if the optimizer sets its own."""
    rate = optimizer.param_groups[0].get("lr")
    return math.nan if rate is None else float(rate)


def _step_scheduler(scheduler: Any, row: Mapping[str, float]) -> None:
    """Step a scheduler after an epoch; pass the loss to one that monitors a number."""
    if isinstance(scheduler, Plateau):
        scheduler.step(row.get("eval_loss", row["train_loss"]))
    else:
        scheduler.step()
