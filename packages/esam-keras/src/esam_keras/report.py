"""The step report for Keras tensors of any backend."""

from dataclasses import dataclass
from typing import Any

from keras import ops

from esam_core import StepReport
from esam_keras.perturbation import widen

__all__ = ["KerasReport"]


@dataclass(frozen=True)
class KerasReport(StepReport):
    """A `StepReport` with properties computed by `keras.ops`: TensorFlow tensors lack methods.

    They are in float32 or wider, so that means over steps are too: `RunningMeans` cannot widen
    TensorFlow's tensors. `losses` and `loss` are None if the loss has no value per sample.
    """

    @property
    def loss(self) -> Any:
        seen = self.perturbed_losses if self.losses is None else self.losses
        return None if seen is None else ops.mean(widen(seen))

    @property
    def perturbed_loss(self) -> Any:
        return None if self.perturbed_losses is None else ops.mean(widen(self.perturbed_losses))

    @property
    def increases(self) -> Any:
        if self.losses is None or self.perturbed_losses is None:
            return None
        return widen(self.perturbed_losses) - widen(self.losses)

    @property
    def sharpness(self) -> Any:
        return None if self.increases is None else ops.mean(self.increases)

    @property
    def selected_sharpness(self) -> Any:
        if self.increases is None or self.indices is None:
            return None
        return ops.mean(ops.take(self.increases, self.indices, axis=0))

    @property
    def rejected_sharpness(self) -> Any:
        if self.increases is None or self.indices is None:
            return None
        rejected = len(self.losses) - len(self.indices)
        chosen = ops.take(self.increases, self.indices, axis=0)
        return (ops.sum(self.increases) - ops.sum(chosen)) / rejected

    @property
    def threshold(self) -> Any:
        if self.increases is None or self.indices is None:
            return None
        return ops.sort(self.increases)[len(self.losses) - len(self.indices)]
