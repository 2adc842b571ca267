"""Check, once per run, that a sample's loss does not depend on the other samples in the batch.

If it does, a pass on some of the samples uses another loss than a pass on all of them: because
`losses` compares samples with each other, or because an argument was not split by sample (a table
with several rows per sample and a column with the sample's number).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from esam_torch.batch import Batch
from esam_torch.compat import BATCH_NORM, count_writes
from esam_torch.devices import on_device
from esam_torch.dropout import NoiselessEvaluation
from esam_torch.guards import RandomState
from esam_torch.inputs import copied
from esam_torch.task import Task

__all__ = ["comparable", "compare_losses", "disagreement", "noisy_layers"]

#: Mean differences above these thresholds are not rounding errors, even in half precision, where
#: another number of rows may use another kernel. The thresholds are relative to the mean loss and
#: to the losses' standard deviation; the second finds what a large constant in all losses would
#: hide. The third is for TF32.
_OF_THE_MEAN, _OF_THE_SPREAD, _AT_LEAST = 0.02, 0.25, 0.001

#: A smaller standard deviation, relative to the mean loss, is that of equal losses.
_EQUAL = 1e-6

#: Substrings in the names of modules that draw random numbers in training.
_DRAWING = ("dropout", "droppath", "dropblock", "stochastic", "rrelu")


def compare_losses(
    task: Task,
    evaluation: NoiselessEvaluation,
    batch: Batch,
    b: int,
    losses_of: Callable[[Batch, Tensor | None], Tensor],
) -> str | None:
    """Return a warning if the losses of some samples differ without the others in the batch.

    These are as many as in the smallest pass, the last ones, so that each has another place. For
    these two forwards, layers that normalise by the batch or draw random numbers are in evaluation
    mode, in which they make no sample depend on another; functions drop nothing; nothing is
    compiled. They leave no trace. If they raise an error, nothing is compared, and the step goes
    on: its own passes are in training mode, and may succeed.

    Args:
        task: the inputs of the step.
        evaluation: is begun and ended.
        batch: the arguments of `losses`.
        b: the number of samples. If the smallest pass has them all, both forwards run, for the
            other ranks, and nothing is compared.
        losses_of: returns the losses of a batch, or of the samples with some indices, at the same
            weights and from the same random state.
    """
    model, k = task.model, task.smallest_pass(b)
    indices = torch.arange(b - k, b)
    layers = [*noisy_layers(model), *task.statistics_layers, *task.layout.writes.writers()]
    kept = task.layout.writes.keep()
    try:
        evaluation.begin(layers)
        versions = _buffer_versions(model)
        random = RandomState(task.layout.devices)
        whole = losses_of(copied(batch), None)
        drew = random.has_moved() or task.layout.writes.draws
        random.restore()
        alone = losses_of(copied(batch), indices if k < b else None)
        wrote = task.layout.writes.weights_too or _buffer_versions(model) != versions
        if k == b or not comparable(model, drew=drew, wrote=wrote):
            return None
        if drew and not task.scores(b):
            return None  # other noise for the same samples, by which none are selected
    except Exception:
        return None
    finally:
        evaluation.end()
        kept.restore()
    warning = disagreement(whole, indices, alone, drew=drew)
    return None if warning is None else f"{warning} {task.samples.describe(batch, b)}"


def _buffer_versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return the id and version of each floating-point buffer of a model."""
    return [(id(b), count_writes(b)) for b in model.buffers() if b.is_floating_point()]


def noisy_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers in training mode that evaluation mode frees from noise and other samples.

    These are BatchNorm layers, and layers without submodules that draw random numbers: a larger
    module may compute something else in evaluation mode, such as detections instead of losses.
    """
    return [
        module
        for module in model.modules()
        if module.training
        and (_couples(module) or (next(module.children(), None) is None and _draws(module)))
    ]


def comparable(model: nn.Module, *, drew: bool, wrote: bool) -> bool:
    """Return whether losses of the same samples must agree with and without the other samples.

    They need not agree with modules that normalise by the batch or draw random numbers in these
    forwards: row j of a part gets the noise of row j of the whole batch.

    Args:
        model: the model that `losses` calls.
        drew: whether a forward changed the state of the random generators. If it did and no module
            of the model draws random numbers, `losses` itself does, which is worth a warning.
        wrote: whether a forward wrote to buffers, as modules with running statistics do.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> comparable(net, drew=True, wrote=False), comparable(net.eval(), drew=True, wrote=False)
        (False, True)
    """
    return not wrote and not any(
        (_couples(module) and (module.training or not _has_statistics(module)))
        or (module.training and drew and _draws(module))
        for module in model.modules()
    )


def _has_statistics(module: nn.Module) -> bool:
    """Return whether a BatchNorm layer has running statistics for evaluation mode."""
    return any(b.is_floating_point() for b in module.buffers(recurse=False))


def _couples(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm layer of any library, and not a block with one."""
    if isinstance(module, BATCH_NORM):
        return True
    name = type(module).__name__.lower()
    alone = next(module.children(), None) is None
    return alone and "batch" in name and "norm" in name and "frozen" not in name


def _draws(module: nn.Module) -> bool:
    """Return whether a module in training is, or seems to be, dropout with a rate above 0."""
    named = any(word in type(module).__name__.lower() for word in _DRAWING)
    rates = [
        value
        for name, value in vars(module).items()
        if isinstance(value, int | float) and ("drop" in name or (named and name == "p"))
    ]
    return any(rate > 0 for rate in rates) if rates else named


def disagreement(
    whole: Tensor, indices: Tensor, alone: Tensor, *, drew: bool = False
) -> str | None:
    """Return a warning if the losses of some samples differ without the others, else None.

    The host waits for the device once, so this is called only once per run.

    Args:
        whole: (b,) losses of the whole batch.
        indices: (k,) indices of some samples, on any device.
        alone: (k,) losses of these samples alone, at the same weights.
        drew: whether the losses drew random numbers.

    Returns:
        What was found and what to do about it; None if the losses agree, if some are not finite, or
        if they have no values (on the meta device).

    Example:
        >>> losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> disagreement(losses, torch.tensor([1, 3]), torch.tensor([2.0, 4.0]))
        >>> warning = disagreement(losses, torch.tensor([1, 3]), torch.tensor([1.0, 2.0]))
        >>> print(warning.split(" The ")[0])
        `losses` must give a sample the same loss whichever other samples are in the batch.
    """
    whole, alone = whole.detach(), alone.detach()
    if alone.is_meta:
        return None
    together = whole.index_select(0, on_device(indices, whole.device))
    spread, mean = (x.expand(len(alone)) for x in (whole.std(correction=0), whole.abs().mean()))
    rows = torch.stack([t.to(alone.dtype) for t in (together, alone, spread, mean)]).cpu().double()
    if not bool(rows.isfinite().all()):
        return None
    together, alone, spread, mean = rows
    gap, size = float((alone - together).abs().mean()), float(mean[0])
    by_rounding = min(_OF_THE_MEAN * size, _OF_THE_SPREAD * float(spread[0]))
    if gap <= max(by_rounding, _AT_LEAST * size):
        return None
    seen = (
        f"{_count(len(alone))} a mean loss of {float(together.mean()):.3g} with the other samples "
        f"and of {float(alone.mean()):.3g} without them, at the same weights, and single losses "
        f"differ by {gap:.3g}."
    )
    factor = _common_factor(alone, together)
    if drew:
        return f"{_NOISE} {seen}"
    if len(whole) > 1 and float(spread[0]) <= _EQUAL * size:
        cause = (
            "All samples of the batch have the same loss. If it exists only for the whole batch, "
            "use gamma=1.0 without ascend=Part(...): each pass then has all samples. Otherwise "
            'return one loss per sample, as F.cross_entropy(..., reduction="none") does.'
        )
    elif factor is not None:
        cause = (
            f"Each is {factor:.3g} times the other: is there a factor such as `* len(batch)` in "
            "`losses`, or a sum that is divided by something of the whole batch? Remove it, or "
            "pass the divisor as Whole(x)."
        )
    else:
        cause = (
            "If `losses` compares samples with each other (InfoNCE, prototypes, advantages "
            "normalised over the batch), use ESAM(..., gamma=1.0) without ascend=Part(...): each "
            "pass then has all samples. If an argument was split in the wrong way, wrap it in "
            "Rows(x) or Whole(x). If an argument has several rows per sample (boxes with the "
            "number of their image), pass one list or padded row per sample, or "
            "take=function(batch, indices) to ESAM."
        )
    return (
        "`losses` must give a sample the same loss whichever other samples are in the batch. "
        f"{seen} {cause}"
    )


_NOISE = (
    "`losses` draws random numbers (mixup, noise, sampled latents), and a pass on some samples "
    "draws other ones for them than the pass on all samples by which they were selected. So part "
    "of the selection is noise. To avoid this, draw the numbers before the step and pass them as "
    "part of the batch, or use gamma=1.0."
)


def _count(k: int) -> str:
    """Return the beginning of a sentence about k samples."""
    return "The last sample had" if k == 1 else f"The last {k} samples had"


def _common_factor(alone: Tensor, together: Tensor) -> float | None:
    """Return the factor that is common to all losses, or None if there is none."""
    ratios = alone / together
    factor = float(ratios.mean())
    alike = (ratios - factor).abs().max() < abs(factor - 1.0) / 50
    return factor if bool(alike) else None
