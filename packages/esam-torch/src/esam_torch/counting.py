"""The number of samples in a batch: before the first pass, and whether it can be right."""

from collections.abc import Callable

import torch
from torch import nn

from esam_core import ESAMConfig
from esam_torch.batch import Batch, Samples, row_counts
from esam_torch.inputs import call_apart
from esam_torch.inspection import Layout, without_side_effects
from esam_torch.losses import LossFunction, per_sample

__all__ = ["SampleCounter"]


class SampleCounter:
    """Counts the samples of batches: from their values if possible, else from their losses.

    Args:
        samples: selects samples from batches, and remembers where they are.
        note: is called with the name and the text of a warning.
    """

    def __init__(self, samples: Samples, note: Callable[[str, str], None]) -> None:
        self._samples = samples
        self._note = note
        self._counted: set[Samples] = set()

    def count(self, model: nn.Module, layout: Layout, losses: LossFunction, batch: Batch) -> int:
        """Return the number of samples of a batch.

        Args:
            model: the model that `losses` calls.
            layout: the model's layout.
            losses: the user's function. It is called, without a graph or side effects, only if the
                size cannot be read from the batch.
            batch: the arguments of `losses`.

        Raises:
            ESAMTypeError, ESAMValueError: samples cannot be selected from the batch.
        """
        samples = self._samples.of(losses, batch)
        known = samples.size(batch)
        if known is not None:
            return known
        bare = samples.bare(batch)
        with without_side_effects(model, layout.devices, layout.writes), torch.no_grad():
            values, _ = per_sample(call_apart(losses, bare))
        if len(values) > 1:
            if samples in self._counted:
                self._note("size", _COUNTED)
            self._counted.add(samples)
            samples.check(batch, len(values))  # so that the size of the next batch can be read
        return len(values)

    def look_at_one_loss(self, config: ESAMConfig, batch: Batch) -> None:
        """Note a warning if a step has one loss, but its batch seems to have several samples.

        Args:
            config: the hyperparameters.
            batch: the arguments of `losses`.
        """
        settings = [f"gamma={config.select.gamma:g}"] if config.select.gamma < 1.0 else []
        if config.climbs_on_part:
            settings.append(f"ascend={config.ascend!r}")
        rows = row_counts(batch) if settings else ()
        if rows and min(rows) > 1:
            self._note("one", _ONE.format(min(rows), " and ".join(settings)))


_ONE = (
    "`losses` returned one loss for a batch whose tensors have at least {} rows. So steps use all "
    "samples, and {} saves nothing. Return one loss per sample. If the loss exists only for the "
    "whole batch, use gamma=1.0, without ascend=Part(...)."
)

_COUNTED = (
    "A step whose ascent pass does not use the whole batch needs the number of samples before its "
    "first pass. It cannot be read from the batch, so each step runs one more forward to count "
    "the losses. Wrap a value with one entry per sample in Rows(x) to avoid this."
)
