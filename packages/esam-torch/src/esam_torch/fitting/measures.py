"""Losses, metrics and report fields, summed up on the device."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMTypeError, ESAMValueError, StepReport
from esam_torch.fitting.data import Arguments, arguments, moved
from esam_torch.fitting.ranks import summed
from esam_torch.losses import per_sample

__all__ = ["Means", "Metric", "ModelLosses", "accuracy", "evaluate"]

ModelLosses = Callable[..., Any]
Metric = Callable[..., Tensor]

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


def accuracy(outputs: Tensor, *batch: Any) -> Tensor:
    """Return 1.0 for each sample whose class is the likeliest, else 0.0.

    Args:
        outputs: (b, classes) scores.
        *batch: the batch, class numbers of shape (b,) last.

    Example:
        >>> accuracy(torch.eye(3), None, torch.tensor([0, 1, 0]))
        tensor([1., 1., 0.])
    """
    targets: Tensor = batch[-1]
    return (outputs.argmax(1) == targets).float()


class Means:
    """Means of losses and metrics over samples, and of report fields over steps.

    Sums stay on the device until they are asked for, so that no batch waits for it.

    Args:
        metrics: functions of (outputs, *batch) that return one number per sample, by name.
        device: where the sums are kept.
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device) -> None:
        self._metrics = metrics
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def samples(self) -> int:
        """How many samples there have been."""
        return self._counts.get("loss", 0)

    def _add(self, name: str, total: Any, count: int) -> None:
        """Add a sum over `count` things."""
        total = torch.as_tensor(total, dtype=torch.float32, device=self._device)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + count

    def update(self, losses: Tensor, outputs: Any, batch: Arguments) -> None:
        """Add a batch: its (b,) losses, what the model put out, and the batch itself."""
        values = {"loss": losses}
        if self._metrics and outputs is None:
            raise ESAMValueError(
                "`losses` must return (losses, outputs) where there are metrics. "
                "Received: losses alone."
            )
        for name, metric in self._metrics.items():
            value = metric(outputs, *batch)
            if not isinstance(value, Tensor) or value.shape != losses.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ESAMTypeError(
                    f"The metric {name!r} must return one number per sample, a tensor of shape "
                    f"{tuple(losses.shape)}. Received: {got}."
                )
            values[name] = value
        for name, value in values.items():
            self._add(name, value.detach().sum(dtype=torch.float32), len(losses))

    def report(self, report: StepReport) -> None:
        """Add what a step reported. Fields that it did not compute do not count."""
        for name in REPORTED:
            value = getattr(report, name)
            if value is not None:
                self._add(name, value, 1)

    def result(self, *, everywhere: bool = False) -> dict[str, float]:
        """Return the means, of all ranks where asked; here the device is waited for."""
        sums = [float(total) for total in self._sums.values()]
        counts = [float(self._counts[name]) for name in self._sums]
        if everywhere:
            sums, counts = summed(sums, self._device), summed(counts, self._device)
        return {
            name: total / count
            for name, total, count in zip(self._sums, sums, counts, strict=True)
            if count
        }

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._counts.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, for a checkpoint."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved sums."""
        self._sums = {name: total.to(self._device) for name, total in state["sums"].items()}
        self._counts = dict(state["counts"])


def evaluate(
    model: nn.Module,
    losses: ModelLosses,
    loader: Iterable[Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    device: torch.device | str = "cpu",
    everywhere: bool = False,
) -> dict[str, float]:
    """Return the mean loss and metrics of a model in evaluation mode.

    Args:
        model: any module; its mode is put back.
        losses: a function of the model and the batch, as in `fit`.
        loader: batches.
        metrics: as in `fit`. Default none.
        device: where the model is. Default the CPU.
        everywhere: whether `loader` holds this rank's share of the samples, and the means are to
            be those of all ranks. Default False.

    Returns:
        "loss" and the metrics' names, each with its mean over samples.

    Raises:
        ESAMValueError: there is no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    means = Means(metrics or {}, torch.device(device))
    model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                inputs = arguments(moved(batch, torch.device(device)))
                values, outputs = per_sample(losses(model, *inputs))
                means.update(values, outputs, inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    if not means.samples:
        raise ESAMValueError("The evaluation loader must hold a batch. Received: none.")
    return means.result(everywhere=everywhere)
