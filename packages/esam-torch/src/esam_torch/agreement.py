"""Check, once per run, that a sample's loss does not depend on the other samples in the batch.

The selection pass and the descent pass run at the same weights. If the losses of the same samples
differ between them, the descent pass uses a different loss than the selection.
"""

import torch
from torch import Tensor, nn

from esam_torch.compat import BATCH_NORM, count_writes

__all__ = ["buffer_versions", "comparable", "disagreement"]

#: Mean differences above these thresholds are not rounding errors, even in half precision, where
#: another number of rows may use another kernel. The thresholds are relative to the mean loss and
#: to the losses' standard deviation; the second finds what a large constant in all losses would
#: hide. The third is for TF32.
_OF_THE_MEAN, _OF_THE_SPREAD, _AT_LEAST = 0.02, 0.25, 0.001

#: Substrings in the names of modules that draw random numbers in training.
_DRAWING = ("dropout", "droppath", "dropblock", "stochastic", "rrelu")


def buffer_versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return the id and version of each floating-point buffer of a model."""
    return [(id(b), count_writes(b)) for b in model.buffers() if b.is_floating_point()]


def comparable(model: nn.Module, *, drew: bool, wrote: bool) -> bool:
    """Return whether losses of the same samples must agree between the two passes.

    They need not agree with BatchNorm, which makes samples depend on each other, nor with dropout:
    in the descent pass, row j gets the noise that row j of the whole batch had.

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
        _couples(module) or (drew and _draws(module))
        for module in model.modules()
        if module.training
    )


def _couples(module: nn.Module) -> bool:
    """Return whether a module in training is a BatchNorm layer of any library."""
    name = type(module).__name__.lower()
    derived = isinstance(module, BATCH_NORM)
    return derived or ("batch" in name and "norm" in name and "frozen" not in name)


def _draws(module: nn.Module) -> bool:
    """Return whether a module in training is, or seems to be, dropout with a rate above 0."""
    named = any(word in type(module).__name__.lower() for word in _DRAWING)
    rates = [
        value
        for name, value in vars(module).items()
        if isinstance(value, int | float) and ("drop" in name or (named and name == "p"))
    ]
    return any(rate > 0 for rate in rates) if rates else named


def disagreement(selection_losses: Tensor, indices: Tensor, descent_losses: Tensor) -> str | None:
    """Return a warning if the losses of the selected samples differ in the descent pass, else None.

    The host waits for the device once, so this is called only once per run.

    Args:
        selection_losses: (b,) losses of the whole batch at theta + epsilon.
        indices: (k,) indices of the selected samples.
        descent_losses: (k,) losses of the selected samples alone, at the same weights.

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
    alone = descent_losses.detach()
    if alone.is_meta:
        return None
    together = selection_losses.detach().index_select(0, indices)
    spread = selection_losses.detach().std(correction=0).expand(len(alone))
    rows = torch.stack([t.to(alone.dtype) for t in (together, alone, spread)]).cpu().double()
    if not bool(rows.isfinite().all()):
        return None
    together, alone, spread = rows
    gap, size = float((alone - together).abs().mean()), float(together.abs().mean())
    by_rounding = min(_OF_THE_MEAN * size, _OF_THE_SPREAD * float(spread[0]))
    if gap <= max(by_rounding, _AT_LEAST * size):
        return None
    seen = (
        f"The {len(alone)} selected samples had a mean loss of {float(together.mean()):.3g} with "
        f"the other samples and of {float(alone.mean()):.3g} without them, at the same weights, "
        f"and single losses differ by {gap:.3g}."
    )
    factor = _common_factor(alone, together)
    if factor is not None:
        cause = (
            f"Each is {factor:.3g} times the other: is there a factor such as `* len(batch)` in "
            "`losses`, or a sum that is divided by something of the whole batch? Remove it, or "
            "pass the divisor as Whole(x)."
        )
    else:
        cause = (
            "If `losses` compares samples with each other (InfoNCE, prototypes, advantages "
            "normalised over the batch), use ESAM(..., gamma=1.0), which selects all samples. If "
            "it draws random numbers (mixup, noise), draw them before the step and pass them as "
            "part of the batch. If an argument was split in the wrong way, wrap it in Rows(x) or "
            "Whole(x), or pass take=function(batch, indices) to ESAM."
        )
    return (
        "`losses` must give a sample the same loss whichever other samples are in the batch. "
        f"{seen} {cause}"
    )


def _common_factor(alone: Tensor, together: Tensor) -> float | None:
    """Return the factor that is common to all losses, or None if there is none."""
    ratios = alone / together
    factor = float(ratios.mean())
    alike = (ratios - factor).abs().max() < abs(factor - 1.0) / 50
    return factor if bool(alike) else None
