"""Losses and metrics over a data set, summed up on the device."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMTypeError, ESAMValueError
from esam_torch.fitting.data import Arguments, arguments, moved
from esam_torch.losses import per_sample

__all__ = ["Means", "Metric", "ModelLosses", "accuracy", "evaluate"]

ModelLosses = Callable[..., Any]
Metric = Callable[..., Tensor]


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
    """Means over samples of losses and metrics; sums stay on the device until asked for.

    Args:
        metrics: functions of (outputs, *batch) that return one number a sample, by name.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._sums: dict[str, Tensor] = {}
        self.samples = 0

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
                    f"The metric {name!r} must return one number a sample, a tensor of shape "
                    f"{tuple(losses.shape)}. Received: {got}."
                )
            values[name] = value
        self.samples += len(losses)
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.float32)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def result(self) -> dict[str, float]:
        """Return the means; here the device is waited for."""
        return {name: float(total) / self.samples for name, total in self._sums.items()}


def evaluate(
    model: nn.Module,
    losses: ModelLosses,
    loader: Iterable[Any],
    *,
    metrics: Mapping[str, Metric] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return the mean loss and metrics of a model in evaluation mode.

    Args:
        model: any module; its mode is put back.
        losses: a function of the model and the batch, as in `fit`.
        loader: batches.
        metrics: as in `fit`. Default none.
        device: where the model is. Default the CPU.

    Returns:
        "loss" and the metrics' names, each with its mean over samples.

    Raises:
        ESAMValueError: there is no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    means = Means(metrics or {})
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
    return means.result()
