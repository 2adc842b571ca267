"""What a user writes around a value of the batch to say how it is to be read."""

from typing import Any

__all__ = ["WAYS_OUT", "Rows", "Whole"]

#: What to do where a batch is not read as meant.
WAYS_OUT = (
    "Write Rows(x) around a value with one entry per sample, Whole(x) around one that `losses` "
    "needs whole, or give ESAM take=function(batch, indices), which returns the selected samples."
)


class Rows:
    """Marks a value of the batch that has one entry per sample.

    A list that can be read in two ways needs it: three images with three channels each, in a batch
    of three, or three tensors with one row per sample. `losses` receives the bare value, and in
    the descent pass the entries of the selected samples.

    Args:
        value: a tensor or array with b rows, a list or tuple of b entries, an object with a length
            of b that can be indexed, or a mapping or dataclass of these.

    Example:
        >>> import torch
        >>> from esam_torch import Rows
        >>> images = Rows([torch.ones(3, 8, 8), torch.ones(3, 9, 9), torch.ones(3, 7, 7)])
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Rows({self.value!r})"


class Whole:
    """Marks a value of the batch that `losses` needs whole, never a part of it.

    A tensor whose first dimension happens to equal the batch size is taken for one row per sample.
    Wrap it where that is wrong; `losses` receives the bare value.

    Args:
        value: anything.

    Example:
        >>> import torch
        >>> from esam_torch import Whole
        >>> class_weights = Whole(torch.ones(10))     # ten classes, and ten samples in the batch
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Whole({self.value!r})"
