"""The training loop: `esam_torch.fit` and its parts."""

from esam_torch.fitting.history import History
from esam_torch.fitting.loop import fit
from esam_torch.fitting.measures import accuracy, evaluate

__all__ = ["History", "accuracy", "evaluate", "fit"]
