"""One training run: the same schedule for each method, resumable to the bit, one JSON a run."""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.costs import flops_ratio
from benchmarks.data.source import Source, load_source
from benchmarks.machine import provenance
from benchmarks.methods import Stepper, make_stepper, parse_method
from benchmarks.models import build

__all__ = ["Probe", "Run", "Trainer", "learning_rate", "train"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run depends on.

    Args:
        method: "NAME" or "NAME@RHO".
        data: as in `load_source`.
        model: a key of `MODELS`.
        width: of the model; None is the published one.
        epochs: passes over the training images.
        batch: samples a step.
        lr: peak learning rate; a cosine takes it to 0 over the run.
        warmup: epochs in which the learning rate rises linearly from 0.
        optimizer: the base optimizer, "sgd" (momentum .9) or "adamw".
        m: samples that one perturbation is for, as with a shard a device; None is the batch.
        weight_decay: of the base optimizer.
        sharp_weight_decay: in its place for all methods but the base; None is the same.
        smoothing: of the labels.
        rho: radius where the method names none.
        beta: for random masks.
        gamma: for selectors.
        seed: of weights, order, augmentation, masks and selections.
        images: training images in all; None is all.
        classes: how many; None is all.
        spare: test on the training images that are left out as well.
        size: to average the images down to; None leaves them.
        noise: share of wrong training labels.
        augment: crop and mirror the training images.
        device: where it runs.
        bf16: autocast to bfloat16.
        channels_last: memory format.
        compile: compile the model's blocks.
        test_every: epochs between tests; there is always one behind the last.
    """

    method: str
    data: str
    model: str
    width: int | None = None
    epochs: int = 200
    batch: int = 128
    lr: float = 0.05
    warmup: int = 0
    optimizer: str = "sgd"
    m: int | None = None
    weight_decay: float = 5e-4
    sharp_weight_decay: float | None = None
    smoothing: float = 0.0
    rho: float = 0.05
    beta: float = 0.6
    gamma: float = 0.5
    seed: int = 0
    images: int | None = None
    classes: int | None = None
    spare: bool = False
    size: int | None = None
    noise: float = 0.0
    augment: bool = True
    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    test_every: int = 1

    @property
    def effective_rho(self) -> float:
        """The radius that the method runs with; 0 for the base optimizer."""
        method = parse_method(self.method)
        if method.family == "base":
            return 0.0
        return self.rho if method.rho is None else method.rho

    def file_name(self, data_name: str) -> str:
        """Return the stem of the run's files: what one looks for, not all it depends on."""
        width = "" if self.width is None else f"w{self.width}"
        noise = "" if not self.noise else f"-noise{self.noise:g}"
        method = self.method.replace("@", "-rho")
        return f"{data_name}{noise}-{self.model}{width}-{method}-seed{self.seed}"


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to 0.

    Args:
        step: in [0, steps).
        steps: of the whole run.
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

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one loss a sample."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            logits = self.model(x)
        return F.cross_entropy(
            logits.float(), y, reduction="none", label_smoothing=self.run.smoothing
        )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train for one epoch; return its mean loss (at theta) and the seconds it took."""
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
            total += seen[0].mean()  # the first pass is the one at theta
            if self.observe is not None:
                self.observe(epoch, report)
        self._synchronise()
        seconds = clock() - start
        return {"train_loss": float(total) / self.source.steps, "seconds": seconds}

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        """Return loss and accuracy, in percent, on the test images."""
        self.model.eval()
        right = torch.zeros((), device=self.device)
        loss = torch.zeros((), device=self.device)
        n = 0
        for x, y in self.source.test():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
                logits = self.model(x).float()
            right += (logits.argmax(1) == y).sum()
            loss += F.cross_entropy(logits, y, reduction="sum")
            n += len(y)
        return {"test_loss": float(loss) / n, "accuracy": 100 * float(right) / n}

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on as if never interrupted."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "run": dataclasses.asdict(self.run),
            "model": self.model.state_dict(),
            "stepper": self.stepper.state_dict(),
            "random": random,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(state["stepper"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), self.device)


class Probe(Protocol):
    """Something that looks on while a run trains.

    Attributes:
        options: its name, and all that its values depend on beside the run, as plain data: kept in
            the run's record, so that what another probe measured is not taken for this one's.
    """

    options: dict[str, Any]

    def observe(self, epoch: int, report: Any) -> None:
        """See the report of a step; None where the method has none."""
        ...

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        """Return what to add to the row of an epoch that has ended; leave the trainer as it is."""
        ...


def new_model(run: Run, source: Source) -> nn.Module:
    """Return the run's network for its data, on the CPU, with weights from torch's generator."""
    channels, size, _ = source.shape
    return build(run.model, classes=source.classes, channels=channels, size=size, width=run.width)


def new_stepper(run: Run, model: nn.Module, steps: int) -> Stepper:
    """Return what takes the run's steps."""
    method = parse_method(run.method)
    decay = run.weight_decay
    if method.family != "base" and run.sharp_weight_decay is not None:
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
        steps=steps,
        seed=run.seed,
        m=run.m,
        parts=1 if run.m is None else -(-run.batch // run.m),
    )


def train(
    run: Run,
    folder: Path,
    *,
    checkpoint_every: int = 1,
    stop_after: int | None = None,
    probe: Probe | None = None,
    keep_weights: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a run to its end, from its checkpoint where there is one, and write its JSON.

    Args:
        run: the options.
        folder: gets NAME.json when the run is done; checkpoints/NAME.pt while it is not.
        checkpoint_every: epochs between checkpoints.
        stop_after: epochs in this call, as if killed behind them; None goes on to the end.
        probe: told of each step, and asked behind each epoch for what to add to its row.
        keep_weights: write the trained weights to weights/NAME.pt. A run whose weights are not
            there, as where its record alone was kept, is trained again.
        say: told of each epoch.

    Returns:
        The run's record, as in the JSON; its last epochs missing if it was stopped.

    Raises:
        ValueError: the folder holds a run of this name that was made with other options, or with
            another probe.
    """
    trainer = Trainer(run, observe=None if probe is None else probe.observe)
    stem = run.file_name(trainer.source.name)
    done, saved = folder / f"{stem}.json", folder / "checkpoints" / f"{stem}.pt"
    weights = folder / "weights" / f"{stem}.pt"
    if done.exists():
        record = json.loads(done.read_text("utf-8"))
        _refuse_other(done, record, run, probe)
        if weights.exists() or not keep_weights:
            say(f"{stem}: done before")
            return record
        say(f"{stem}: done before, but its weights are not here: trained again")
    history: list[dict[str, float]] = []
    if saved.exists():
        state = torch.load(saved, map_location=trainer.device, weights_only=True)
        _refuse_other(saved, state, run, probe)
        trainer.load(state)
        history = state["history"]
        say(f"{stem}: resumed behind epoch {len(history)}")
    first = len(history)
    for epoch in range(first, run.epochs):
        row: dict[str, Any] = {"epoch": epoch + 1, **trainer.train_epoch(epoch)}
        if (epoch + 1) % run.test_every == 0 or epoch + 1 == run.epochs:
            row.update(trainer.test())
        if probe is not None:
            row.update(probe.measure(trainer, epoch))
        history.append(row)
        say(
            f"{stem}: epoch {row['epoch']}/{run.epochs} loss {row['train_loss']:.3f} "
            f"test {row.get('accuracy', float('nan')):.2f}% {row['seconds']:.1f} s"
        )
        stopping = stop_after is not None and epoch + 1 - first >= stop_after
        if stopping or (epoch + 1) % checkpoint_every == 0:
            _save({**trainer.state(), "probe": _options(probe), "history": history}, saved)
        if stopping:
            break
    record = _record(trainer, history, probe)
    if len(history) == run.epochs:
        if keep_weights:
            _save(trainer.model.state_dict(), weights)
        done.parent.mkdir(parents=True, exist_ok=True)
        _write_text(done, json.dumps(record, indent=1))
        saved.unlink(missing_ok=True)
    return record


def _clock(device: torch.device) -> Callable[[], float]:
    """Return what times an epoch: on a CPU the process's own time, which leaves out other work."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def _options(probe: Probe | None) -> dict[str, Any] | None:
    """Return what is kept of a probe: None where there is none, as in records without the field."""
    return None if probe is None else probe.options


def _refuse_other(path: Path, found: dict[str, Any], run: Run, probe: Probe | None) -> None:
    """Refuse a record or checkpoint that was made with other options or another probe."""
    for what, here, asked in (
        ("options", found["run"], dataclasses.asdict(run)),
        ("probe options", {"probe": found.get("probe")}, {"probe": _options(probe)}),
    ):
        if here != asked:
            names = [name for name in asked if here.get(name) != asked[name]]
            differing = ", ".join(f"{n}={asked[n]!r}, not {here.get(n)!r}" for n in names)
            raise ValueError(
                f"{path} holds a run of other {what}. Choose another `out`. Received: {differing}."
            )


def _record(
    trainer: Trainer, history: list[dict[str, float]], probe: Probe | None
) -> dict[str, Any]:
    """Return what is kept of a run."""
    run = trainer.run
    seconds = sum(row["seconds"] for row in history)
    # The median: compilation and other work on the machine fall into single epochs.
    epoch_seconds = statistics.median(row["seconds"] for row in history)
    images = trainer.source.steps * trainer.source.batch
    return {
        "run": dataclasses.asdict(run),
        "probe": _options(probe),
        "title": trainer.method.title,
        "norm": trainer.method.norm if trainer.method.family == "esam" else None,
        "rho": run.effective_rho,
        "data": {
            "name": trainer.source.name,
            "note": trainer.source.note,
            "training_images": trainer.source.training_images,
        },
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "final": history[-1].get("accuracy"),
        "best": max((row["accuracy"] for row in history if "accuracy" in row), default=None),
        "clock": "processor time" if trainer.device.type == "cpu" else "wall",
        "seconds": seconds,
        "images_per_second": images / epoch_seconds,
        "flops_ratio": flops_ratio(
            run, trainer.source, trainer.steps, len(list(trainer.model.parameters()))
        ),
        "history": history,
        **provenance(),
    }


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a kill leaves the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    torch.save(state, half)
    os.replace(half, path)


def _write_text(path: Path, text: str) -> None:
    half = path.with_suffix(".half")
    half.write_text(text + "\n", "utf-8")
    os.replace(half, path)
