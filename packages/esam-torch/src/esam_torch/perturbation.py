"""Epsilon from the ascent gradient, in a few fused kernels; see `esam_core.perturbation`.

No value leaves the device, so the host never waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esam_core import Mask
from esam_core.perturbation import Norm
from esam_torch.devices import on_device, on_host
from esam_torch.finiteness import flaw_in, zero_unless
from esam_torch.kinds import Kinds, join_kinds, kinds_of, split_by_kind
from esam_torch.sharded import local, local_part, total_norms
from esam_torch.targets import Targets
from esam_torch.values import widened

__all__ = ["Ascent", "draw_weight_masks", "perturb"]


@dataclass(frozen=True)
class Ascent:
    """The perturbation of a step.

    Args:
        perturbations: epsilon_t for each perturbed parameter; 0 if a gradient is not finite.
        gradient_norm: 0-d, the ||g|| of equation 2 as `norm` defines it; that of "masked" with
            norm="none".
        perturbation_norm: 0-d, ||epsilon||.
        flaw: 0-d, 0 if all losses and gradients were finite, else NaN.
    """

    perturbations: list[Tensor]
    gradient_norm: Tensor
    perturbation_norm: Tensor
    flaw: Tensor


def perturb(
    gradients: list[Tensor],
    targets: Targets,
    losses: Tensor,
    scale: Tensor,
    *,
    norm: Norm,
    norm_eps: float,
    weight_masks: list[Tensor] | None = None,
) -> Ascent:
    """Compute perturbations from gradients.

    Equations: SAM (Foret et al. 2021, eq. 2), SWP (Du et al. 2022, eq. 6), ASAM (Kwon et al. 2021,
    with its eta = 0); see `esam_core.perturbation`.

    Args:
        gradients: scale * g_t of the perturbed parameters, dense, followed by those of the idle
            ones with `norm="full"`. The list is emptied, so that their memory can be reused. For a
            sharded parameter, this rank's part.
        targets: the perturbed parameters, and their factors.
        losses: (b,) losses at theta.
        scale: 0-d, the factor of the gradients. The perturbation increases what is minimised, so a
            negative scale reverses the direction; with a scale of 0 there is none.
        norm: "masked", "estimated", "full" or "none".
        norm_eps: added to the norm.
        weight_masks: None, or one boolean tensor per parameter for masks of single weights. The
            list is emptied too.
    """
    device = losses.device
    parameters = targets.tensors
    with torch.no_grad():
        idle = gradients[len(parameters) :]
        directions = gradients[: len(parameters)]
        gradients.clear()
        if targets.any_adaptive:
            directions = _stretch(directions, parameters, targets.adaptive)  # |theta| g
        whole = total_norms(_norms(directions, targets.kinds, device), targets.spread)
        masked = whole
        if weight_masks is not None:
            for i, mask in enumerate(weight_masks):
                directions[i] = directions[i] * mask
            weight_masks.clear()
            masked = total_norms(_norms(directions, targets.kinds, device), targets.spread)
        masked_norm = torch.linalg.vector_norm(masked)
        if norm == "estimated":
            scales = torch.tensor(targets.scales, dtype=masked.dtype, device="cpu")
            length = torch.linalg.vector_norm(masked * on_device(scales.sqrt(), device))
        elif norm == "full":
            rest = _stretch(idle, targets.idle, targets.idle_adaptive)
            lengths = total_norms(_norms(rest, kinds_of(rest), device), targets.idle_spread)
            length = torch.linalg.vector_norm(torch.cat([whole, lengths]))
            del rest
            idle.clear()
        else:
            length = masked_norm
        flaw = length * 0.0  # the norm is finite only if all gradients are
        magnitude = on_device(scale, device).to(length.dtype).abs()
        length = length / magnitude
        divisor = torch.ones_like(length) if norm == "none" else length + norm_eps
        tiny = torch.finfo(divisor.dtype).tiny
        if norm_eps < tiny:  # it is negligible: a zero gradient must give zero, not 0 * inf
            divisor = divisor.clamp_min(tiny)
        usable = magnitude + flaw > 0.0
        common = torch.where(usable, divisor.reciprocal() / magnitude, 0.0)
        if on_host(device) and flaw.item() != 0.0:  # 0 * inf is NaN; checking is free here
            directions = [torch.zeros_like(d) for d in directions]
            masked, masked_norm = torch.zeros_like(masked), torch.zeros_like(masked_norm)
        if targets.any_adaptive:
            directions = _stretch(directions, parameters, targets.adaptive)  # |theta|^2 g
        if targets.factor is not None:
            common = common * targets.factor
        perturbations = _scale(directions, targets, common)
        if targets.any_adaptive:
            lengths = total_norms(_norms(perturbations, targets.kinds, device), targets.spread)
            size = torch.linalg.vector_norm(lengths)
        elif targets.factor is not None:
            size = masked_norm * common
        else:
            factors = torch.tensor(targets.factors, dtype=masked.dtype, device="cpu")
            size = torch.linalg.vector_norm(masked * on_device(factors, device)) * common
        if not on_host(device):
            for some in targets.by_kind(perturbations):
                zero_unless(usable, some)
            size = torch.where(usable, size, 0.0)
        return Ascent(perturbations, length, size, flaw + flaw_in(losses))


def draw_weight_masks(mask: Mask, like: Sequence[Tensor]) -> list[Tensor] | None:
    """Draw the masks of single weights with torch's generator, from the mask's seed."""
    if mask.weight_beta is None or mask.weight_seed is None:
        return None
    generators: dict[torch.device, torch.Generator] = {}
    masks = []
    for tensor in like:
        device = tensor.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(mask.weight_seed)
        drawn = torch.rand(tensor.shape, generator=generators[device], device=device)
        masks.append(local_part(drawn < mask.weight_beta, tensor))
    return masks


def _norms(tensors: list[Tensor], kinds: Kinds, device: torch.device) -> Tensor:
    """Return the (T,) Euclidean norms of tensors, accumulated in float32 or wider.

    Args:
        tensors: T tensors.
        kinds: their kinds.
        device: of the result.
    """
    if not tensors:
        return torch.zeros(0, device=device)
    parts = [_norms_of_a_kind(some, device) for some in split_by_kind(tensors, kinds)]
    if len(parts) == 1:
        return parts[0]
    widest = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
    return torch.stack(join_kinds([part.to(widest).unbind() for part in parts], kinds))


def _norms_of_a_kind(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the norms of tensors with the same device and dtype."""
    wide = widened(tensors[0].dtype)
    dtype = None if wide == tensors[0].dtype else wide
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))
    return on_device(norms.real if norms.is_complex() else norms, device)


def _stretch(
    gradients: list[Tensor], parameters: Sequence[Tensor], adaptive: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients, those of adaptive parameters times |theta| (times theta, if real)."""
    places = [i for i, flag in enumerate(adaptive) if flag]
    if not places:
        return gradients
    weights = [local(parameters[i].data) for i in places]
    sizes = [w.abs() if w.is_complex() else w for w in weights]
    products = iter(torch._foreach_mul([gradients[i] for i in places], sizes))
    return [next(products) if a else g for g, a in zip(gradients, adaptive, strict=True)]


def _scale(directions: list[Tensor], targets: Targets, common: Tensor) -> list[Tensor]:
    """Return each direction times a 0-d tensor and, if they are different, its own factor."""
    scaled = []
    for places, some in zip(targets.kinds, targets.by_kind(directions), strict=True):
        here = on_device(common, some[0].device)
        if targets.factor is not None:
            products = torch._foreach_mul(some, here)
        else:
            products = torch._foreach_mul(some, [targets.factors[i] for i in places])
            torch._foreach_mul_(products, here)
        scaled.append(products)
    return join_kinds(scaled, targets.kinds)
