"""Data selection on the device; see `esam_core.selectors.select` for the reference."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from esam_core import selectors
from esam_torch.devices import on_device, widest

__all__ = ["Selected", "select"]


@dataclass(frozen=True)
class Selected:
    """(k,) ascending indices and (k,) weights of the descent pass, on the losses' device."""

    indices: Tensor
    weights: Tensor


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores, ascending; ties go to the lower index.

    NaN counts as infinite: a sample with such a loss is rejected only for others not finite.
    """
    known = torch.where(torch.isnan(scores), torch.inf, scores)
    order = torch.sort(known, descending=True, stable=True).indices
    return torch.sort(order[:k]).values


def adds_in_integers(values: Tensor) -> bool:
    """Return whether sums must be those of integers.

    On CUDA, `cumsum` of floats is not deterministic, and raises an error if torch must be.
    """
    return values.device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def in_integers(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) numbers >= 0, not all 0, as whole multiples of a unit, and this power of two.

    The multiples are rounded. Their sum is about 2**53 at most: sums of them do not depend on the
    order.
    """
    total = values.sum()
    unit = torch.ldexp(torch.ones_like(total), torch.frexp(total).exponent - 53)
    return (values / unit).round(), unit


def running_sums(values: Tensor) -> Tensor:
    """Return the sums of the first 1, 2, ... of (n,) numbers >= 0, not all 0."""
    if not adds_in_integers(values):
        return values.cumsum(0)
    multiples, unit = in_integers(values)
    return multiples.to(torch.int64).cumsum(0).to(values.dtype) * unit


def inclusion_probabilities(scores: Tensor, k: int, floor: float) -> Tensor:
    """Return (b,) probabilities proportional to score plus floor, at most 1, that sum to k.

    The reference finds the certain samples in a loop, which would wait for the device. Here the
    scores are sorted in ascending order. If all but the first m samples are certain, each of the
    first m gets (k - (b - m)) score / (the sum of the first m). The largest m for which this is at
    most 1 is used.
    """
    # In float64 if the device supports it: sums of probabilities are compared with integers.
    wide = scores.to(widest(scores.device))
    clipped = wide.clamp_min(0.0)
    mean = clipped.mean()
    usable = (mean > 0.0) & (mean < torch.inf)
    q = torch.where(usable, clipped + floor * mean, 1.0)
    if adds_in_integers(q):
        multiples, unit = in_integers(q)
        q = multiples * unit  # rounded as in the sums that it is compared with
    ascending = torch.sort(q).values
    sums = running_sums(ascending)
    left = torch.arange(k - len(q) + 1, k + 1, device=q.device, dtype=q.dtype)
    last = (left * ascending <= sums).sum(0, keepdim=True) - 1  # the uncertain ones are the first m
    share = left.gather(0, last) / sums.gather(0, last)  # indexing would wait
    return (share * q).clamp_max(1.0)


def systematic_indices(pi: Tensor, k: int, offset: float) -> Tensor:
    """Return k ascending indices, i with probability pi_i: the intervals that contain a point."""
    ends = running_sums(pi)
    points = offset + torch.arange(k, device=pi.device, dtype=pi.dtype)
    # A point that rounding places after the last interval belongs to the last sample, once.
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
    """Return the samples that `selector` selects, if it does not select all.

    Args:
        selector: any selector of esam-core.
        b: the number of samples.
        losses: (b,) losses at theta; of any length if the selector does not use them.
        perturbed_losses: (b,) losses at theta + epsilon, or None if its score does not need them.
        seed: in [0, 2**63).
        count: the step count, >= 0.
    """
    device = losses.device
    k = selectors.subset_size(selector.gamma, b)
    if selector.rule == "random":
        drawn = torch.from_numpy(selectors.random_indices(b, k, seed=seed, count=count))
        return Selected(on_device(drawn, device), _even(k, losses))
    scores = losses if selector.score == "loss" else cast(Tensor, perturbed_losses) - losses
    if selector.rule == "top":
        return Selected(top_indices(scores, k), _even(k, losses))
    pi = inclusion_probabilities(scores, k, cast(selectors.Proportional, selector).floor)
    indices = systematic_indices(pi, k, selectors.systematic_offset(seed=seed, count=count))
    return Selected(indices, (1.0 / (b * pi[indices])).to(losses.dtype))


def _even(k: int, like: Tensor) -> Tensor:
    """Return k equal weights that sum to 1."""
    return torch.full((k,), 1.0 / k, device=like.device, dtype=like.dtype)
