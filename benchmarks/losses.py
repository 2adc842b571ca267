"""One loss per sample, for any network."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["sample_losses"]


def sample_losses(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each sample, shape (b,): the mean over a sample's targets.

    Args:
        logits: (b, classes, ...).
        targets: (b, ...), whole numbers.
        smoothing: label smoothing.
    """
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)
