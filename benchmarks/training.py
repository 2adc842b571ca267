"""One training run, with the same schedule for all methods, that can be resumed."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data.source import Source, load_source
from benchmarks.losses import sample_losses
from benchmarks.methods import Stepper, make_stepper, parse_method
from benchmarks.models import build
from benchmarks.run import Run

__all__ = ["Probe", "Trainer", "learning_rate", "new_model", "new_stepper"]


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to 0.

    Args:
        step: in [0, steps).
        steps: number of steps of the whole run.
        warmup: steps of the warm-up.
        peak: the largest value.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Trainer:
    """Model, data and stepper of a run, and its epochs.

    Args:
        run: the options.
        observe: called with (epoch, report) after each step, or None.
    """

    def __init__(self, run: Run, observe: Callable[[int, Any], None] | None = None) -> None:
        self.run = run
        self.method = parse_method(run.method)
        self.device = torch.device(run.device)
        self.source: Source = load_source(
            run.data,
            batch=run.batch,
            seed=run.seed,
            device=self.device,
            images=run.images,
            classes=run.classes,
            first_class=run.first_class,
            spare=run.spare,
            size=run.size,
            noise=run.noise,
            augment=run.augment,
            channels_last=run.channels_last,
        )
        torch.manual_seed(run.seed)
        self.model = new_model(run, self.source).to(self.device)
        if run.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if run.compile:
            for block in self.model.children():
                block.compile()
        self.steps = run.epochs * self.source.steps
        self.stepper = new_stepper(run, self.model, self.steps)
        self.observe = observe

    @property
    def tested(self) -> nn.Module:
        """The model that is tested: the averaged one where the method averages weights."""
        return self.model if self.stepper.averaged is None else self.stepper.averaged

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one loss per sample."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            logits = self.model(x)
        return sample_losses(logits.float(), y, smoothing=self.run.smoothing)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train for one epoch; return its mean loss and its duration in seconds.

        The loss is that of the first pass of each step: at the weights, of the part of the batch
        that this pass sees, or at the perturbed weights if there is no pass at the weights.
        """
        self.model.train()
        total = torch.zeros((), device=self.device)
        warmup = self.run.warmup * self.source.steps
        self._synchronise()
        clock = _clock(self.device)
        start = clock()

        def losses(x: Tensor, y: Tensor) -> Tensor:
            values = self.losses(x, y)
            seen.append(values.detach())
            return values

        for i, (x, y) in enumerate(self.source.epoch(epoch)):
            seen: list[Tensor] = []
            lr = learning_rate(epoch * self.source.steps + i, self.steps, warmup, self.run.lr)
            for group in self.stepper.base.param_groups:
                group["lr"] = lr
            report = self.stepper.step(losses, x, y)
            total += seen[0].mean()
            if self.observe is not None:
                self.observe(epoch, report)
        self._synchronise()
        seconds = clock() - start
        return {"train_loss": float(total) / self.source.steps, "seconds": seconds}

    def test(self) -> dict[str, float]:
        """Return loss and accuracy, in percent, on the test images."""
        loss, accuracy = self.evaluate(self.source.test())
        return {"test_loss": loss, "accuracy": accuracy}

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Return the mean loss and the accuracy, in percent, in evaluation mode."""
        losses, right = self.outcomes(batches)
        return float(losses.mean()), 100 * float(right.mean())

    @torch.no_grad()
    def outcomes(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample, and the share of its targets predicted correctly."""
        model = self.tested
        model.eval()
        losses, right = [], []
        for x, y in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
                logits = model(x).float()
            losses.append(sample_losses(logits, y))
            right.append((logits.argmax(1) == y).float().reshape(len(y), -1).mean(1))
        return torch.cat(losses).double(), torch.cat(right).double()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything that a run needs to resume exactly."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "stepper": self.stepper.state_dict(),
            "random": random,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load a state."""
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(state["stepper"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), self.device)


class Probe:
    """An observer of a training run.

    Attributes:
        options: its name and its own options, as plain data. They are kept in the run's record, so
            that measurements of different probes are not confused.
    """

    options: dict[str, Any]

    def observe(self, epoch: int, report: Any) -> None:
        """Observe the report of a step; None if the method has none."""

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        """Return values to add to the row of a finished epoch, without changing the trainer."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return its state between epochs, for a checkpoint."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Load a state."""


def new_model(run: Run, source: Source) -> nn.Module:
    """Return the run's network for its data, on the CPU, with weights from torch's generator."""
    channels, size, _ = source.shape
    return build(run.model, classes=source.classes, channels=channels, size=size, width=run.width)


def new_stepper(run: Run, model: nn.Module, steps: int) -> Stepper:
    """Return the object that runs the run's steps."""
    method = parse_method(run.method)
    decay = run.weight_decay
    if method.family not in ("base", "average") and run.sharp_weight_decay is not None:
        decay = run.sharp_weight_decay
    base: torch.optim.Optimizer
    if run.optimizer == "sgd":
        base = torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9, weight_decay=decay)
    elif run.optimizer == "adamw":
        base = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=decay)
    else:
        raise ValueError(f"`optimizer` must be 'sgd' or 'adamw'. Received: {run.optimizer!r}.")
    return make_stepper(
        method,
        base,
        model,
        model_name=run.model,
        rho=run.rho,
        beta=run.beta,
        gamma=run.gamma,
        ema=run.ema,
        steps=steps,
        seed=run.seed,
        m=run.m,
        parts=1 if run.m is None else -(-run.batch // run.m),
    )


def _clock(device: torch.device) -> Callable[[], float]:
    """Return the clock for epochs: on a CPU the process's own time, which excludes other work."""
    return time.process_time if device.type == "cpu" else time.perf_counter
