"""Means of losses, metrics and report fields, summed on the device."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esam_core import ESAMTypeError, ESAMValueError, StepReport
from esam_torch.batch import Samples
from esam_torch.fitting.data import Arguments, arguments, move_batch
from esam_torch.fitting.ranks import sum_over_ranks
from esam_torch.losses import per_sample

__all__ = ["Means", "Metric", "ModelLosses", "Seen", "accuracy", "check_metrics", "evaluate"]

ModelLosses = Callable[..., Any]
Metric = Callable[..., Tensor]

#: The report fields in a history, in addition to losses and metrics.
REPORTED = (
    "sharpness",
    "selected_sharpness",
    "rejected_sharpness",
    "perturbation_norm",
    "gradient_norm",
    "weight_share",
    "sample_share",
)


class Seen(NamedTuple):
    """What one pass of the model has computed.

    Args:
        losses: (n,) losses of the samples in the pass.
        outputs: the other results of the user's function.
        batch: its arguments, for these samples.
    """

    losses: Tensor
    outputs: Any
    batch: Arguments


def accuracy(outputs: Tensor, *batch: Any) -> Tensor:
    """Return 1.0 for each sample whose class has the highest score, else 0.0.

    Args:
        outputs: (b, classes) scores.
        *batch: the batch; its last element is the (b,) class indices.

    Example:
        >>> accuracy(torch.eye(3), None, torch.tensor([0, 1, 0]))
        tensor([1., 1., 0.])
    """
    targets: Tensor = batch[-1]
    return (outputs.argmax(1) == targets).float()


def check_metrics(metrics: Any) -> dict[str, Metric]:
    """Return the metrics by name, none for None; raise for names that mean something else."""
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        raise ESAMTypeError(
            '`metrics` must be functions by name, such as {"accuracy": accuracy}. '
            f"Received: metrics={metrics!r}."
        )
    taken = [name for name in metrics if name in ("loss", *REPORTED)]
    if taken:
        raise ESAMValueError(
            "The names of `metrics` must not be those of numbers that are reported anyway: loss, "
            f"{', '.join(REPORTED)}. Received: {', '.join(map(repr, taken))}. Use another name."
        )
    return dict(metrics)


class Means:
    """Means of losses and metrics over samples, and of report fields over steps.

    Sums of tensors stay on the device, and those of Python numbers on the host, until `result` is
    called, so that no batch waits for the device.

    Args:
        metrics: functions of (outputs, *batch) that return one number per sample, by name.
        device: the device of the sums.
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device) -> None:
        self._metrics = metrics
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def _add(self, name: str, total: Any, count: int) -> None:
        """Add a sum over `count` values."""
        if isinstance(total, Tensor):
            total = total.to(self._device, torch.float32)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        else:
            self._numbers[name] = self._numbers.get(name, 0.0) + float(total)
        self._counts[name] = self._counts.get(name, 0) + count

    def update(self, losses: Tensor, seen: Seen) -> None:
        """Add a batch: the losses to average, and the pass that metrics are computed from."""
        values = {"loss": losses}
        if self._metrics and seen.outputs is None:
            raise ESAMValueError(
                "`losses` must return (losses, outputs) if there are metrics. Received: only "
                "losses."
            )
        for name, metric in self._metrics.items():
            value = metric(seen.outputs, *seen.batch)
            if not isinstance(value, Tensor) or value.shape != seen.losses.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ESAMTypeError(
                    f"The metric {name!r} must return one number per sample, a tensor of shape "
                    f"{tuple(seen.losses.shape)}. Received: {got}."
                )
            values[name] = value
        for name, value in values.items():
            self._add(name, value.detach().sum(dtype=torch.float32), len(value))

    def add_step(self, report: StepReport) -> None:
        """Add a step whose `outputs` are a `Seen`. Fields that it did not compute are left out."""
        losses = report.perturbed_losses if report.losses is None else report.losses
        self.update(losses, report.outputs)
        for name in REPORTED:
            value = getattr(report, name)
            if value is not None:
                self._add(name, value, 1)

    def result(self, *, everywhere: bool = False) -> dict[str, float]:
        """Return the means, over all ranks if `everywhere`. This synchronises with the device."""
        # All names in one order: another rank may have measured fewer, or none.
        names = ("loss", *self._metrics, *REPORTED)
        sums = [float(self._sums.get(name, 0.0)) + self._numbers.get(name, 0.0) for name in names]
        counts = [float(self._counts.get(name, 0)) for name in names]
        if everywhere:
            sums, counts = sum_over_ranks(sums, self._device), sum_over_ranks(counts, self._device)
        return {
            name: total / count
            for name, total, count in zip(names, sums, counts, strict=True)
            if count
        }

    def reset(self) -> None:
        """Reset all sums."""
        self._sums.clear()
        self._numbers.clear()
        self._counts.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, for a checkpoint."""
        # On the host: ranks exchange them, and must not use each other's GPUs.
        sums = {name: total.cpu() for name, total in self._sums.items()}
        return {"sums": sums, "numbers": dict(self._numbers), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load saved sums."""
        self._sums = {name: total.to(self._device) for name, total in state["sums"].items()}
        self._numbers = dict(state["numbers"])
        self._counts = dict(state["counts"])


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def evaluate(
    model: nn.Module,
    losses: ModelLosses,
    loader: Iterable[Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    device: torch.device | str = "auto",
    everywhere: bool = False,
) -> dict[str, float]:
    """Return the mean loss and metrics of a model in evaluation mode.

    Args:
        model: any module; its mode is restored.
        losses: a function of the model and the batch, as in `fit`.
        loader: batches.
        metrics: as in `fit`. Default none.
        device: the device to move batches to. Default "auto": the model's own, which is not moved.
        everywhere: whether `loader` yields only this rank's share of the samples, so that means are
            computed over all ranks. Default False.

    Returns:
        The means over samples, by name: "loss" and the metrics.

    Raises:
        ESAMValueError: the loader is empty.

    Example:
        >>> from torch.nn import functional as F
        >>> def losses(model, inputs, targets):
        ...     return F.cross_entropy(model(inputs), targets, reduction="none")
        >>> batches = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(2)]
        >>> sorted(evaluate(nn.Linear(4, 3), losses, batches))
        ['loss']
    """
    modes = [(module, module.training) for module in model.modules()]
    place = _device_of(model) if device == "auto" else torch.device(device)
    means = Means(check_metrics(metrics), place)
    model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                inputs, _ = Samples().bare((arguments(move_batch(batch, place)), {}))
                values, outputs = per_sample(losses(model, *inputs))
                means.update(values, Seen(values, outputs, inputs))
    finally:
        for module, mode in modes:
            module.training = mode
    found = means.result(everywhere=everywhere)
    if "loss" not in found:  # on all ranks, so that none waits for another
        raise ESAMValueError("The evaluation loader must yield a batch. Received: none.")
    return found
