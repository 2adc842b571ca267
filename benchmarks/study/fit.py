"""The probe of the study's runs: accuracy on the training samples at the end.

It also measures accuracy on the samples that were left out of the descent pass most, and the test
accuracy with BatchNorm statistics recomputed at the final weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from benchmarks.data.batches import Batches
from benchmarks.data.text import Passages
from benchmarks.training import Probe, Trainer

__all__ = ["FIT", "Fit"]

#: The options of the probe; they are part of a run's key.
FIT: dict[str, Any] = {"name": "fit"}


class Fit(Probe):
    """Accuracy on the training samples after the last epoch.

    For methods that select samples for the descent pass: also the accuracy of each quarter of the
    training samples, from the quarter that was left out least to the one that was left out most.
    For networks with BatchNorm: also the test accuracy with statistics recomputed from the training
    samples. If no pass at the weights sees the whole batch, the running statistics are those of
    perturbed weights.
    """

    options = FIT

    def __init__(self) -> None:
        self._descents: list[Tensor] = []  # of this epoch: indices in the batch
        self._left_out: Tensor | None = None  # how often, for each training sample

    def observe(self, epoch: int, report: Any) -> None:
        """Note which samples a step selected."""
        if report is not None and report.indices is not None:
            self._descents.append(report.indices)

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        """Return the accuracies, in percent, after the last epoch."""
        source = trainer.source
        if isinstance(source, Batches) and self._descents:
            self._count(source, epoch)
        if epoch + 1 < trainer.run.epochs or not isinstance(source, Batches | Passages):
            return {}
        losses, right = trainer.outcomes(source.training())
        found: dict[str, Any] = {
            "training_loss": float(losses.mean()),
            "training_accuracy": 100 * float(right.mean()),
        }
        if self._left_out is not None:
            quarters = right.cpu()[self._left_out.argsort(stable=True)].tensor_split(4)
            found["accuracy_by_rejection"] = [100 * float(part.mean()) for part in quarters]
            found["left_out_by_rejection"] = [
                float(part.double().mean())
                for part in self._left_out.sort(stable=True).values.tensor_split(4)
            ]
        if any(isinstance(module, nn.BatchNorm2d) for module in trainer.tested.modules()):
            found["recomputed_accuracy"] = _accuracy_with_recomputed_statistics(trainer)
        return found

    def _count(self, source: Batches, epoch: int) -> None:
        """Count how often each sample of the epoch was left out of the descent pass."""
        order, size = source.order(epoch), source.batch
        if self._left_out is None:
            self._left_out = torch.zeros(len(order), dtype=torch.int64)
        for i, chosen in enumerate(self._descents):
            seen = order[i * size : (i + 1) * size]
            out = torch.ones(len(seen), dtype=torch.int64)
            out[chosen.cpu()] = 0
            self._left_out[seen] += out
        self._descents.clear()

    def state(self) -> dict[str, Any]:
        """Return how often each sample has been left out so far."""
        return {"left_out": self._left_out}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self._left_out = state["left_out"]


def _accuracy_with_recomputed_statistics(trainer: Trainer) -> float:
    """Return the test accuracy in percent after `update_bn`; the model is not changed."""
    assert isinstance(trainer.source, Batches)
    model = trainer.tested
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    update_bn((x for x, _ in trainer.source.training()), model)
    accuracy = trainer.test()["accuracy"]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return accuracy
