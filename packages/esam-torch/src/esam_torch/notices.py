"""Warnings raised within a step, kept until the user's next call."""

import torch
from torch import nn

__all__ = ["Notices", "recurrent_dropout_warning", "rounding_warning"]


class Notices:
    """Warnings, at most one of each kind."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._waiting: list[str] = []

    def __contains__(self, kind: str) -> bool:
        return kind in self._seen

    def add(self, kind: str, text: str | None) -> None:
        """Keep the first text of each kind; None marks the kind as done without a warning."""
        if kind not in self._seen:
            self._seen.add(kind)
            if text is not None:
                self._waiting.append(text)

    def take(self) -> list[str]:
        """Return and remove the texts added since the last call."""
        waiting, self._waiting = self._waiting, []
        return waiting


def recurrent_dropout_warning(model: nn.Module) -> str | None:
    """Return a warning if recurrent layers drop units on a GPU; None if there are none.

    There, cuDNN draws their dropout from a random state of its own, which torch cannot restore.

    Example:
        >>> print(recurrent_dropout_warning(nn.LSTM(8, 8, num_layers=2, dropout=0.5)))
        None
    """
    if not torch.backends.cudnn.enabled:
        return None
    names = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
        and module.training
        and module.dropout > 0.0
        and module.num_layers > 1
        and device_type(module) == "cuda"
    ]
    if not names:
        return None
    return (
        f"On a GPU, the dropout inside {', '.join(names)} differs between the passes of a step, "
        "because cuDNN keeps its random state, which torch cannot restore. So part of the measured "
        "sharpness is noise. Use layers with num_layers=1 and nn.Dropout between them, or set "
        "torch.backends.cudnn.enabled = False."
    )


def device_type(module: nn.Module) -> str:
    """Return the type of the device of a module's first parameter."""
    return next(module.parameters()).device.type


def rounding_warning(share: float) -> str | None:
    """Return a warning about the share of a perturbation that was rounded away; None if it is 0."""
    if share == 0.0:
        return None
    return (
        f"{share:.1%} of the entries of the first perturbation were rounded away: they are too "
        "small for weights in half precision. Keep the weights in float32 and use torch.autocast, "
        "or use a larger rho."
    )
