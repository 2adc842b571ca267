"""How many samples a batch holds, where that has to be known before the first pass."""

from collections.abc import Callable

import torch
from torch import nn

from esam_torch.batch import Batch, Samples
from esam_torch.inspection import Layout, leaving_nothing
from esam_torch.losses import LossFunction, per_sample

__all__ = ["SampleCounter"]


class SampleCounter:
    """Counts the samples of batches: by what is known of them, else by their losses.

    Args:
        samples: takes samples out of batches, and remembers where they are.
        note: takes the name and the text of a warning.
    """

    def __init__(self, samples: Samples, note: Callable[[str, str], None]) -> None:
        self._samples = samples
        self._note = note
        self._counted = False

    def count(self, model: nn.Module, layout: Layout, losses: LossFunction, batch: Batch) -> int:
        """Return the number of samples of a batch.

        Args:
            model: what `losses` calls.
            layout: of the model.
            losses: the user's function; called, without a graph and without a trace, only where the
                batch does not tell its size.
            batch: its arguments.

        Raises:
            ESAMTypeError, ESAMValueError: samples cannot be taken from the batch.
        """
        known = self._samples.size(batch)
        if known is not None:
            return known
        args, kwargs = self._samples.bare(batch)
        with leaving_nothing(model, layout.devices, layout.writes), torch.no_grad():
            values, _ = per_sample(losses(*args, **kwargs))
        if len(values) > 1:
            if self._counted:
                self._note("size", _COUNTED)
            self._counted = True
            self._samples.check(batch, len(values))
        return len(values)


_COUNTED = (
    "A step whose climb does not see the whole batch must know the number of samples before its "
    "first pass, and the batch does not tell it: one more forward counts the losses, in each step. "
    "Write Rows(x) around a value with one entry per sample."
)
