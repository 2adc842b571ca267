"""Data selection on the device: the fast twin of `esam_core.selectors.select`."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from esam_core import selectors
from esam_torch.devices import on_device

__all__ = ["Selected", "select"]


@dataclass(frozen=True)
class Selected:
    """(k,) ascending indices and (k,) weights of the descent pass, on the losses' device."""

    indices: Tensor
    weights: Tensor


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores, ascending; ties go to the lower index.

    NaN counts as infinite: a sample that went wrong must not be selected away.
    """
    known = torch.where(torch.isnan(scores), torch.inf, scores)
    order = torch.sort(known, descending=True, stable=True).indices
    return torch.sort(order[:k]).values


def inclusion_probabilities(scores: Tensor, k: int, floor: float) -> Tensor:
    """Return (b,) probabilities proportional to score plus floor, at most 1, that sum to k.

    The reference finds the certain samples in a loop, which would wait for the device. In
    descending order they are the first c, where c is the first place at which the next one
    would get no more than probability 1.
    """
    # Wide, where the device has it: the probabilities are summed up and compared with integers.
    wide = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64)
    clipped = wide.clamp_min(0.0)
    mean = clipped.mean()
    usable = (mean > 0.0) & torch.isfinite(mean)
    q = torch.where(usable, clipped + floor * mean, torch.ones_like(clipped))
    descending, order = torch.sort(q, descending=True, stable=True)
    tails = descending.flip(0).cumsum(0).flip(0)  # sum of q from each place on
    left = k - torch.arange(len(q), device=q.device, dtype=q.dtype)
    fits = left * descending <= tails
    certain = torch.argmax(fits.to(torch.uint8), dim=0, keepdim=True)  # the first place that fits
    share = left.gather(0, certain) / tails.gather(0, certain)  # no indexing: it would wait
    places = torch.arange(len(q), device=q.device)
    pi = torch.where(places < certain, torch.ones_like(q), share * descending)
    return torch.empty_like(pi).scatter_(0, order, pi)


def systematic_indices(pi: Tensor, k: int, offset: float) -> Tensor:
    """Return k ascending indices, i with probability pi_i: the intervals that hold a point."""
    ends = pi.cumsum(0)
    points = offset + torch.arange(k, device=pi.device, dtype=pi.dtype)
    # A point that rounding puts behind the last end belongs to the last sample, once.
    last = torch.arange(len(pi) - k, len(pi), device=pi.device)
    return torch.minimum(torch.searchsorted(ends, points, right=True), last)


def select(
    selector: selectors.Selector,
    b: int,
    losses: Tensor,
    perturbed_losses: Tensor | None,
    *,
    seed: int,
    count: int,
) -> Selected:
    """Return what `selector` keeps of a batch of which it does not keep everything.

    Args:
        selector: any selector of esam-core.
        b: how many samples there are.
        losses: (b,) losses at theta; of any length where the selector does not look at them.
        perturbed_losses: (b,) losses at theta + epsilon, or None where its score needs none.
        seed: in [0, 2**63).
        count: the number of the ascent, >= 0.
    """
    device = losses.device
    k = selectors.subset_size(selector.gamma, b)
    even = torch.full((k,), 1.0 / k, device=device, dtype=losses.dtype)
    if selector.rule == "random":
        drawn = torch.from_numpy(selectors.random_indices(b, k, seed=seed, count=count))
        return Selected(on_device(drawn, device), even)
    scores = losses if selector.score == "loss" else cast(Tensor, perturbed_losses) - losses
    if selector.rule == "top":
        return Selected(top_indices(scores, k), even)
    pi = inclusion_probabilities(scores, k, cast(selectors.Proportional, selector).floor)
    indices = systematic_indices(pi, k, selectors.systematic_offset(seed=seed, count=count))
    return Selected(indices, (1.0 / (b * pi[indices])).to(losses.dtype))
