"""Epsilon from the ascent gradient, in a few fused kernels: the fast twin of the core's.

No value leaves the device, so that the host never waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esam_torch.devices import on_host, placed
from esam_torch.sharded import local, total_norms

__all__ = ["Ascent", "Direction", "perturb"]


@dataclass(frozen=True)
class Direction:
    """How one perturbed parameter is perturbed: m_t / p_t, rho and whether adaptively."""

    scale: float
    rho: float
    adaptive: bool


@dataclass(frozen=True)
class Ascent:
    """The perturbation of a step.

    Args:
        perturbations: epsilon_t for each perturbed parameter; 0 where g is not finite.
        gradient_norm: 0-d, the ||g|| of equation 2 as `norm` defines it; that of "masked" with
            norm="none".
        perturbation_norm: 0-d, ||epsilon||.
        finite: 0-d bool, whether every loss and gradient was.
    """

    perturbations: list[Tensor]
    gradient_norm: Tensor
    perturbation_norm: Tensor
    finite: Tensor


def _norms(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the (T,) Euclidean norms of tensors, accumulated in float32 or wider."""
    if not tensors:
        return torch.zeros(0, device=device)
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    norms: list[Tensor] = [torch.empty(0)] * len(tensors)
    for dtype in set(wide):
        places = [i for i, d in enumerate(wide) if d == dtype]
        found = torch._foreach_norm([tensors[i] for i in places], 2, dtype=dtype)
        for i, norm in zip(places, found, strict=True):
            norms[i] = placed(norm, device)
    widest = torch.float64 if torch.float64 in wide else torch.float32
    return torch.stack([norm.to(widest) for norm in norms])


def perturb(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    directions: Sequence[Direction],
    losses: Tensor,
    *,
    norm: str,
    norm_eps: float,
    weight_masks: Sequence[Tensor] | None = None,
    others: Sequence[tuple[Tensor, Tensor, bool]] = (),
) -> Ascent:
    """Turn gradients into perturbations, in place.

    Equations: SAM (Foret et al. 2021, eq. 2), SWP (Du et al. 2022, eq. 6), ASAM (Kwon et al. 2021,
    with its eta = 0); see `esam_core.perturbation`.

    Args:
        gradients: g_t of the perturbed parameters, dense; overwritten with epsilon_t. Where a
            parameter is sharded over ranks, this rank's part.
        parameters: theta_t of the same.
        directions: one a parameter.
        losses: (b,) losses at theta.
        norm: "masked", "estimated", "full" or "none".
        norm_eps: added to the norm.
        weight_masks: None, or one boolean tensor a parameter for masks of single weights.
        others: (gradient, parameter, adaptive) of the units left alone, for `norm="full"`.
    """
    device = losses.device
    gradients = list(gradients)
    with torch.no_grad():
        # theta g, whose length is that of |theta| g; in place, since another copy of all gradients
        # would be the peak of the step's memory.
        stretched = [i for i, d in enumerate(directions) if d.adaptive]
        _stretch(gradients, parameters, stretched)
        whole = total_norms(_norms(gradients, device), parameters)
        masked = whole
        if weight_masks is not None:
            for gradient, mask in zip(gradients, weight_masks, strict=True):
                gradient.mul_(mask)
            masked = total_norms(_norms(gradients, device), parameters)
        if norm == "estimated":
            scales = torch.tensor([d.scale for d in directions], dtype=masked.dtype)
            length = torch.linalg.vector_norm(masked * placed(scales.sqrt(), device))
        elif norm == "full":
            rest = [g * local(theta.data) if a else g for g, theta, a in others]
            lengths = total_norms(_norms(rest, device), [theta for _, theta, _ in others])
            length = torch.linalg.vector_norm(torch.cat([whole, lengths]))
        else:
            length = torch.linalg.vector_norm(masked)
        # The norm is finite only if every gradient is.
        finite = torch.isfinite(length) & torch.isfinite(losses).all()
        divisor = torch.ones_like(length) if norm == "none" else length + norm_eps
        # A tiny norm_eps may vanish in float32: a gradient of zero must give zero, not 0 * inf.
        divisor = divisor.clamp_min(torch.finfo(divisor.dtype).tiny)
        inverse = torch.where(finite, 1.0 / divisor, torch.zeros_like(divisor))
        _clear_nonfinite(gradients, finite)
        _stretch(gradients, parameters, stretched)  # |theta|^2 g
        _scale(gradients, [d.scale * d.rho for d in directions], inverse)
        size = total_norms(_norms(gradients, device), parameters)
        return Ascent(gradients, length, torch.linalg.vector_norm(size), finite)


def _stretch(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], places: Sequence[int]
) -> None:
    """Multiply gradients at these places by their parameters, in place.

    By the absolute values of complex ones, since theta^2 g need not climb; those of real ones are
    not worth a copy.
    """
    if places:
        weights = [local(parameters[i].data) for i in places]
        weights = [w.abs() if w.is_complex() else w for w in weights]
        torch._foreach_mul_([gradients[i] for i in places], weights)


def _clear_nonfinite(gradients: Sequence[Tensor], finite: Tensor) -> None:
    """Make non-finite gradients zero: 0 * inf is not a number, and epsilon must be 0.

    On a CPU looking is free, and then nothing needs doing in nearly every step.
    """
    if on_host(finite.device) and bool(finite):
        return
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def _scale(gradients: Sequence[Tensor], factors: Sequence[float], inverse: Tensor) -> None:
    """Multiply each gradient by its factor and by the common scalar tensor, in place."""
    by_device: dict[torch.device, list[int]] = {}
    for i, gradient in enumerate(gradients):
        by_device.setdefault(gradient.device, []).append(i)
    for device, places in by_device.items():
        chosen = [gradients[i] for i in places]
        common = placed(inverse, device)
        if len({factors[i] for i in places}) == 1:
            torch._foreach_mul_(chosen, common * factors[places[0]])
        else:
            torch._foreach_mul_(chosen, [factors[i] for i in places])
            torch._foreach_mul_(chosen, common)
