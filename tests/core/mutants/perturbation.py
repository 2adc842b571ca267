"""Wrong rescaling, wrong norms, wrong radii."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.core.mutants.registry import Mutants

from esam_core.perturbation import perturbation_norm, squared_norms
from esam_core.reference.network import Evaluation
from esam_core.reference.step import Step
from esam_core.units import Mask

__all__ = ["MUTANTS"]

Array = NDArray[Any]
Scale = Sequence[float | Array]
MUTANTS = Mutants()


@MUTANTS.caught_by("check_radius")
class NoRescaling(Step):
    """No 1/beta."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Use m instead of m/p."""
        return super().perturbation(g, [np.asarray(np.asarray(s) > 0, float) for s in scale])


@MUTANTS.caught_by("check_radius")
class RadiusShrunk(Step):
    """The radius is slightly too small."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Shrink by a thousandth."""
        return [0.999 * e for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_radius")
class NormPerTensor(Step):
    """Each tensor is divided by its own norm."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide each tensor by its own norm."""
        epsilon = super().perturbation(g, scale)
        common = self.norm(g, scale)
        own = np.sqrt(squared_norms(g, self.theta, self.adaptive))
        return [e * common / n if n else e for e, n in zip(epsilon, own, strict=True)]


@MUTANTS.caught_by("check_radius")
class NormSquared(Step):
    """The square root of the norm is missing."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by the norm again."""
        length = self.norm(g, scale)
        return [e / length if length else e for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_norm_is_that_of_the_masked_units")
class NormOverEverything(Step):
    """The norm is that of the whole gradient instead of the masked units."""

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Return all gradients."""
        everything = Mask((True,) * len(mask.perturbed), mask.probability)
        return super().ascent_gradient(ascent, everything)

    def norm(self, g: Sequence[Array | None], scale: Scale) -> float:
        """Return the norm of all of them."""
        return perturbation_norm(g, self.theta, scale, norm="full", adaptive=self.adaptive)

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by this norm."""
        masked = perturbation_norm(g, self.theta, scale, norm="masked", adaptive=self.adaptive)
        ratio = masked / self.norm(g, scale)
        return [e * ratio for e in super().perturbation(g, scale)]


class _WrongMode(Step):
    """Uses the wrong norm."""

    mode, in_place_of = "masked", ""

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        if config.norm == self.in_place_of:
            config = replace(config, norm=self.mode)
        super().__init__(model, config, settings, base)


@MUTANTS.caught_by("check_norm_modes")
class EstimatedNormUnweighted(_WrongMode):
    """`norm="estimated"` leaves out the factor 1/p."""

    in_place_of = "estimated"


@MUTANTS.caught_by("check_norm_modes")
class FullNormOfThePart(_WrongMode):
    """`norm="full"` uses the norm of the masked units."""

    in_place_of = "full"


@MUTANTS.caught_by("check_norm_modes")
class NoneNormalised(_WrongMode):
    """`norm="none"` still normalises."""

    in_place_of = "none"


@MUTANTS.caught_by("check_norm_modes")
class EstimatedNormSquaredProbability(Step):
    """`norm="estimated"` divides the squares by p twice."""

    def norm(self, g: Sequence[Array | None], scale: Scale) -> float:
        """Divide twice."""
        squares = scale if self.config.norm != "estimated" else [s * s for s in scale]
        return super().norm(g, squares)

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by that norm."""
        ratio = super().norm(g, scale) / self.norm(g, scale)
        return [e * ratio for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_norm_eps")
class NormEpsMissing(Step):
    """`norm_eps` is not added."""

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        super().__init__(model, replace(config, norm_eps=1e-300), settings, base)


@MUTANTS.caught_by("check_zero_gradient")
class ZeroOverZero(Step):
    """A zero gradient is divided by its norm of zero."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide 0 by 0."""
        length = np.float64(self.norm(g, scale))
        return [e * (length / length) for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_zero_gradient")
class TinyNormEpsVanishes(Step):
    """A `norm_eps` that is 0 in the gradient's dtype is added to a norm of zero."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by a norm in float32."""
        divisor = np.float32(self.norm(g, scale) + self.config.norm_eps)
        return [e * (divisor / divisor) for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_adaptive")
class AdaptiveWithoutTheSquare(Step):
    """Adaptive: epsilon is along |theta| g instead of theta^2 g."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Remove one factor |theta|."""
        epsilon = super().perturbation(g, scale)
        return [
            e / np.where(theta == 0, 1, np.abs(theta)) if adaptive else e
            for e, theta, adaptive in zip(epsilon, self.theta, self.adaptive, strict=True)
        ]


@MUTANTS.caught_by("check_adaptive")
class AdaptiveNormOfThePlainGradient(Step):
    """Adaptive: the norm is that of g instead of |theta| g."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Swap the norms."""
        plain = [False] * len(self.theta)
        wrong = perturbation_norm(g, self.theta, scale, norm="masked", adaptive=plain)
        ratio = self.norm(g, scale) / wrong if any(self.adaptive) else 1.0
        return [e * ratio for e in super().perturbation(g, scale)]


@MUTANTS.caught_by("check_adaptive")
class AdaptiveFullNormOfThePlainGradient(Step):
    """Adaptive with `norm="full"`: the norm is that of g instead of |theta| g."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Swap the norms."""
        epsilon = super().perturbation(g, scale)
        if self.config.norm != "full":
            return epsilon
        plain = [False] * len(self.theta)
        wrong = perturbation_norm(g, self.theta, scale, norm="full", adaptive=plain)
        return [e * self.norm(g, scale) / wrong for e in epsilon]


@MUTANTS.caught_by("check_adaptive")
class AdaptiveWithoutANormNormalised(Step):
    """Adaptive with `norm="none"`: the perturbation is still divided by a norm."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide by the norm of |theta| g."""
        epsilon = super().perturbation(g, scale)
        divides = self.config.norm == "none" and any(self.adaptive)
        return [e / self.norm(g, scale) for e in epsilon] if divides else epsilon


@MUTANTS.caught_by("check_adaptive")
class AdaptiveIgnored(Step):
    """`adaptive` does nothing."""

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        super().__init__(model, replace(config, adaptive=False), settings, base)


class _SettingIgnored(Step):
    """One of the settings per parameter is ignored."""

    ignored = ""

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        kept = {
            name: {key: value for key, value in own.items() if key != self.ignored}
            for name, own in (settings or {}).items()
        }
        super().__init__(model, config, kept, base)


@MUTANTS.caught_by("check_groups")
class GroupRhoIgnored(_SettingIgnored):
    """A parameter's own rho is overwritten."""

    ignored = "rho"


@MUTANTS.caught_by("check_groups")
class GroupAdaptiveIgnored(_SettingIgnored):
    """A parameter's own `adaptive` is overwritten."""

    ignored = "adaptive"


@MUTANTS.caught_by("check_groups")
class GroupPerturbIgnored(_SettingIgnored):
    """A parameter's own `perturb=False` is overwritten."""

    ignored = "perturb"


@MUTANTS.caught_by("check_groups")
class NormPerRadius(Step):
    """Parameters with different rho have separate norms."""

    def perturbation(self, g: Sequence[Array | None], scale: Scale) -> list[Array]:
        """Divide each group by its own norm."""
        epsilon = super().perturbation(g, scale)
        common = self.norm(g, scale)
        squares = squared_norms(g, self.theta, self.adaptive)
        own = {
            rho: np.sqrt(sum(s for s, r in zip(squares, self.rho, strict=True) if r == rho))
            for rho in self.rho
        }
        return [
            e * common / own[r] if own[r] else e for e, r in zip(epsilon, self.rho, strict=True)
        ]


@MUTANTS.caught_by("check_convolution")
class KernelsLeftAlone(Step):
    """Tensors with more than two axes are not perturbed."""

    def apply_perturbation(self, epsilon: Sequence[Array]) -> None:
        """Move matrices and vectors only."""
        super().apply_perturbation([e if e.ndim <= 2 else 0 * e for e in epsilon])


@MUTANTS.caught_by("check_groups_without_a_radius")
class RadiusOfZeroInTheNorm(Step):
    """A parameter with rho = 0 is in the mask, and so in the norm."""

    def mask(self) -> Mask:
        """Leave out only what perturb=False excludes."""
        drawn = self.config.perturb.draw(self.model.units, seed=self.config.seed, count=self.count)
        return drawn.within(self.perturb) if any(self.rho) else super().mask()


@MUTANTS.caught_by("check_groups")
class FullNormOfPerturbableUnits(Step):
    """`norm="full"` leaves out parameters with `perturb=False`."""

    def masked_gradients(self, gradient: Any, mask: Mask) -> list[Array | None]:
        """Drop their gradients."""
        found = super().masked_gradients(gradient, mask)
        return [g if p else None for g, p in zip(found, self.perturb, strict=True)]


@MUTANTS.caught_by("check_groups")
class GroupRhoIgnoredByEstimated(Step):
    """With `norm="estimated"`, a parameter's own rho is overwritten."""

    def __init__(self, model: Any, config: Any, settings: Any = None, base: Any = None) -> None:
        super().__init__(model, config, settings, base)
        if config.norm == "estimated":
            self.rho = [config.rho] * len(self.rho)


@MUTANTS.caught_by("check_groups_without_a_radius")
class RhoOfTheConfigDecides(Step):
    """With rho = 0 every step is a base step, whatever a parameter's own rho is."""

    def mask(self) -> Mask:
        """Perturb nothing."""
        mask = super().mask()
        return mask if self.config.rho else mask.within([False] * len(mask.perturbed))
