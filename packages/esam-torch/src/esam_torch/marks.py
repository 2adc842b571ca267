"""Wrappers that tell ESAM how to read a value of the batch."""

from typing import Any

__all__ = ["WAYS_OUT", "Mark", "Rows", "Whole"]

#: Advice if a batch is not read as intended.
WAYS_OUT = (
    "Wrap a value with one entry per sample in Rows(x), wrap one that `losses` needs whole in "
    "Whole(x), or pass take=function(batch, indices), which returns the selected samples, to ESAM."
)


class Mark:
    """A wrapper of a value of the batch.

    Args:
        value: the value.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


class Rows(Mark):
    """Marks a value of the batch that has one entry per sample.

    An ambiguous list needs it: in a batch of three, a list of three tensors with three rows each
    may be one tensor per sample, or three tensors with one row per sample. `losses` receives the
    value without the wrapper, and in the descent pass the entries of the selected samples.

    Args:
        value: a tensor or array with b rows, a list or tuple of b entries, an indexable object of
            length b, or a mapping or dataclass of these.

    Example:
        >>> import torch
        >>> from esam_torch import Rows
        >>> images = Rows([torch.ones(3, 8, 8), torch.ones(3, 9, 9), torch.ones(3, 7, 7)])
    """


class Whole(Mark):
    """Marks a value of the batch that is not split by sample, so that `losses` receives it whole.

    A tensor whose first dimension equals the batch size is read as one row per sample. Wrap it if
    that is wrong; `losses` receives the value without the wrapper.

    Args:
        value: anything.

    Example:
        >>> import torch
        >>> from esam_torch import Whole
        >>> class_weights = Whole(torch.ones(10))     # ten classes, and ten samples in the batch
    """
