"""Whether a sample's loss is its own: the descent on a part of the batch shows it, once in a run.

The selection pass and the descent pass run at the same weights. If the losses of the same samples
differ there, the descent follows another loss than the one that was selected by.
"""

import torch
from torch import Tensor, nn

from esam_torch.compat import BATCH_NORM, times_written

__all__ = ["buffer_versions", "comparable", "disagreement"]

#: Mean differences that rounding does not make, in half precision either, where another number of
#: rows may take another kernel: as shares of the mean loss and of the losses' standard deviation.
#: The second one sees what a large constant in all losses would hide; the third is TF32's rounding.
_OF_THE_MEAN, _OF_THE_SPREAD, _AT_LEAST = 0.02, 0.25, 0.001

#: Words in the names of modules that draw random numbers in training.
_DRAWING = ("dropout", "droppath", "dropblock", "stochastic", "rrelu")


def buffer_versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return which floating-point buffers a model has, and how often each has been written to."""
    return [(id(b), times_written(b)) for b in model.buffers() if b.is_floating_point()]


def comparable(model: nn.Module, *, drew: bool, wrote: bool) -> bool:
    """Return whether losses of the same samples must agree between the two passes.

    They need not where BatchNorm makes the samples depend on each other, and where dropout does:
    in the descent row j has the noise of row j of the batch's start.

    Args:
        model: what `losses` calls.
        drew: whether the generators were in another state after a forward than before it. If they
            were and no module of the model draws, `losses` itself does, which is worth a warning.
        wrote: whether a forward wrote to buffers, as everything does that keeps statistics.

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
    """Return whether a module in training is a BatchNorm of whatever library."""
    name = type(module).__name__.lower()
    derived = isinstance(module, BATCH_NORM)
    return derived or ("batch" in name and "norm" in name and "frozen" not in name)


def _draws(module: nn.Module) -> bool:
    """Return whether a module in training drops something at a rate above zero, or seems to."""
    named = any(word in type(module).__name__.lower() for word in _DRAWING)
    rates = [
        value
        for name, value in vars(module).items()
        if isinstance(value, int | float) and ("drop" in name or (named and name == "p"))
    ]
    return any(rate > 0 for rate in rates) if rates else named


def disagreement(selection_losses: Tensor, indices: Tensor, descent_losses: Tensor) -> str | None:
    """Return a warning if the losses of the selected samples are others in the descent, else None.

    The host waits for the device once, so this is for one step of a run.

    Args:
        selection_losses: (b,) losses of the whole batch at theta + epsilon.
        indices: (k,) indices of the selected samples.
        descent_losses: (k,) losses of the selected samples alone, at the same weights.

    Returns:
        What was seen and what to do; None if the losses agree, if some are not finite, or if they
        have no values (on the meta device).

    Example:
        >>> losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> disagreement(losses, torch.tensor([1, 3]), torch.tensor([2.0, 4.0]))
        >>> print(disagreement(losses, torch.tensor([1, 3]), torch.tensor([1.0, 2.0]))[:74])
        `losses` must give a sample the same loss whichever samples are beside it.
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
        f"The {len(alone)} selected samples had a mean loss of {float(together.mean()):.3g} beside "
        f"the other samples and of {float(alone.mean()):.3g} by themselves, at the same weights, "
        f"and single losses differ by {gap:.3g}."
    )
    factor = _common_factor(alone, together)
    if factor is not None:
        cause = (
            f"Each is {factor:.3g} times the other: is there a factor such as `* len(batch)` in "
            "`losses`, or a sum that is divided by something of the whole batch? Leave it out, or "
            "pass the divisor as Whole(x)."
        )
    else:
        cause = (
            "Where `losses` compares samples with each other (InfoNCE, prototypes, advantages "
            "normalised over the batch), give ESAM gamma=1.0, which takes all samples. Where it "
            "draws random numbers (mixup, noise), draw them before the step and pass them as part "
            "of the batch. Where an argument was not taken apart as it should be, write Rows(x) or "
            "Whole(x) around it, or give ESAM take=function(batch, indices)."
        )
    return (
        f"`losses` must give a sample the same loss whichever samples are beside it. {seen} {cause}"
    )


def _common_factor(alone: Tensor, together: Tensor) -> float | None:
    """Return by what every loss has been multiplied, or None if by several things."""
    ratios = alone / together
    factor = float(ratios.mean())
    alike = (ratios - factor).abs().max() < abs(factor - 1.0) / 50
    return factor if bool(alike) else None
