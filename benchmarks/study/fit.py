"""How well a run fits its training samples at its end."""

from typing import Any

from benchmarks.data.batches import Batches
from benchmarks.training import Trainer

__all__ = ["FIT", "Fit"]

#: The options of the probe, which are part of a run's key.
FIT: dict[str, Any] = {"name": "fit"}


class Fit:
    """A probe: accuracy on the training samples, as they are, behind the last epoch."""

    options = FIT

    def observe(self, epoch: int, report: Any) -> None:
        """See the report of a step."""

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        """Return the accuracy on the training samples, in percent, behind the last epoch."""
        if epoch + 1 < trainer.run.epochs or not isinstance(trainer.source, Batches):
            return {}
        loss, accuracy = trainer.evaluate(trainer.source.training())
        return {"training_loss": loss, "training_accuracy": accuracy}
