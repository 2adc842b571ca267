"""Gradients and perturbations on a copy of a model that is being trained."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import Trainer

__all__ = ["Point", "cosine", "inner", "length", "point_of", "shift"]


@dataclass(frozen=True)
class Point:
    """A copy of a model in training mode, and its loss.

    BatchNorm normalises by batch statistics, as in the passes of a step; its running statistics
    belong to the copy.

    Args:
        model: the copy.
        parameters: its trained parameters, in the model's order.
    """

    model: nn.Module
    parameters: list[Tensor]

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return one loss per sample."""
        return F.cross_entropy(self.model(x).float(), y, reduction="none")

    def gradient(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the gradient of the mean loss."""
        return list(torch.autograd.grad(self.losses(x, y).mean(), self.parameters))


def point_of(trainer: Trainer) -> Point:
    """Return the point that a run has reached."""
    model = copy.deepcopy(trainer.model).train()
    return Point(model, [p for p in model.parameters() if p.requires_grad])


@contextmanager
def shift(point: Point, by: Sequence[Tensor]) -> Iterator[None]:
    """Move the parameters inside the context."""
    copies = [p.detach().clone() for p in point.parameters]
    with torch.no_grad():
        torch._foreach_add_(point.parameters, list(by))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(point.parameters, copies)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors, summed in double precision."""
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def length(a: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of a list of tensors."""
    return inner(a, a) ** 0.5


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the cosine of the angle between two lists of tensors."""
    return inner(a, b) / (length(a) * length(b) + 1e-30)
