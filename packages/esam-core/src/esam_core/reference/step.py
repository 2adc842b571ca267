"""One ESAM step, slow and literal: the specification that every backend is checked against.

`Step.backward` is the table of the phases; each phase is a method, and each equation a function
of `perturbation`, `selectors`, `directions` or this module.

Source: Du et al., ICLR 2022 (arXiv 2110.03141), algorithm 1 and equations 6 to 10. What the paper
leaves open is decided here, a rule at a time, and said where it is decided.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core import directions, selectors
from esam_core.config import ESAMConfig
from esam_core.draws import uniforms
from esam_core.errors import ESAMValueError, NonFiniteError
from esam_core.perturbation import Norm, perturbation_norm, perturbations
from esam_core.problem import Batch
from esam_core.reference.memory import Memory
from esam_core.reference.network import Evaluation, Model
from esam_core.reference.optimizers import BaseOptimizer
from esam_core.report import StepReport
from esam_core.units import Mask

__all__ = ["Step", "mean_weights", "scales", "subset"]

Array = NDArray[Any]


def mean_weights(b: int) -> Array:
    """Return the b weights 1/b: the sum of w_i l_i is then L_B, the mean loss."""
    return np.full(b, 1.0 / b)


def subset(batch: Batch, indices: Array) -> Batch:
    """Return the samples of a batch at these indices: B+ of equation 8."""
    return Batch(batch.inputs[indices], batch.targets[indices])


def scales(mask: Mask, parameters: Sequence[Array]) -> list[float | Array]:
    """Return m_t / p_t of equation 6 for each unit; of each scalar weight where those are drawn.

    Masks of single weights are every backend's own draw: only their law is shared.
    """
    if mask.weight_beta is None or mask.weight_seed is None:
        return list(mask.scale)
    result: list[float | Array] = []
    for t, (scale, theta) in enumerate(zip(mask.scale, parameters, strict=True)):
        drawn = uniforms(theta.size, seed=mask.weight_seed, count=0, stream=t) < mask.weight_beta
        # Chosen, not multiplied: a scale may be inf, and 0 * inf is not a number.
        chosen = np.where(drawn.reshape(theta.shape), scale, 0.0)
        result.append(np.asarray(chosen, dtype=theta.dtype))
    return result


class Step:
    """ESAM around a model in NumPy: everything but the base optimizer's update.

    Args:
        model: see `Model`.
        config: hyperparameters.
        settings: parameter name -> its own "rho", "adaptive" or "perturb", where they differ.
        base: the optimizer that makes the updates, whose first moments `Momentum` reads.

    Attributes:
        count: the number of the next ascent.
        memory: what earlier steps have left to climb along.

    Raises:
        ESAMValueError: `ascend=Momentum()`, and the base has no first moment.

    Example:
        >>> import numpy as np
        >>> from esam_core import ESAMConfig
        >>> from esam_core.problem import Batch, Dense
        >>> from esam_core.reference import Network
        >>> model = Network([Dense("head", np.array([[0.5, -0.5]]))])
        >>> step = Step(model, ESAMConfig.from_arguments(rho=0.1, beta=1.0, gamma=0.5))
        >>> batch = Batch(np.array([[1.0], [2.0]]), np.array([0, 1]))
        >>> gradient, report = step.backward(batch)
        >>> report.indices.tolist(), round(float(report.perturbation_norm), 6)
        ([1], 0.1)
    """

    def __init__(
        self,
        model: Model,
        config: ESAMConfig,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        base: BaseOptimizer | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.count = 0
        own = settings or {}
        names = [unit.name for unit in model.units]
        self.rho = [float(own.get(n, {}).get("rho", config.rho)) for n in names]
        self.adaptive = [bool(own.get(n, {}).get("adaptive", config.adaptive)) for n in names]
        self.perturb = [bool(own.get(n, {}).get("perturb", True)) for n in names]
        self.memory = Memory(config, model.units, self.perturb, base)

    @property
    def theta(self) -> list[Array]:
        """The T arrays theta_t themselves, not copies."""
        return [self.model.parameters[unit.name] for unit in self.model.units]

    def backward(self, batch: Batch) -> tuple[dict[str, Array], StepReport]:
        """Return the descent gradient and the report; the parameters are as they were.

        Args:
            batch: b >= 1 samples.

        Returns:
            The gradients by name, to be added to whatever is there (none with
            `on_nonfinite="skip"` where something was not finite), and the report.

        Raises:
            ESAMValueError: the batch is empty.
            NonFiniteError: with `on_nonfinite="raise"`.
            BaseException: whatever the model raises. Parameters, random state and count are then
                as they were on entry.
        """
        if len(batch.targets) == 0:
            raise ESAMValueError("The batch must not be empty. Received: a batch of 0 samples.")
        entry = self.model.random_state
        buffers = {name: array.copy() for name, array in self.model.buffers.items()}
        theta = [array.copy() for array in self.theta]  # restored from, bit for bit
        try:
            with np.errstate(all="ignore"):  # values that are not finite have their own rules
                mask = self.mask()
                if mask.active and self.has_direction(mask):
                    gradient, report = self.perturbed_step(batch, mask, entry)
                else:
                    gradient, report = self.base_step(batch)
            if self.config.on_nonfinite != "propagate" and not self.is_finite(gradient, report):
                gradient, report = self.nonfinite(report)
                self.restore_buffers(buffers)
        except BaseException:
            self.model.random_state = entry
            self.restore_buffers(buffers)
            raise
        finally:
            self.restore(theta)
        self.count += 1
        return gradient, report

    def mask(self) -> Mask:
        """Phase 1: the mask of *this* step. Units that may not move, or not far, stay out."""
        units = self.model.units
        mask = self.config.perturb.draw(units, seed=self.config.seed, count=self.count)
        allowed = [p and r > 0.0 for p, r in zip(self.perturb, self.rho, strict=True)]
        return mask.within(allowed)

    def base_step(self, batch: Batch) -> tuple[dict[str, Array], StepReport]:
        """An empty mask, or rho = 0: the base optimizer's ordinary gradient, and nothing else."""
        evaluation = self.model.evaluate(batch, statistics="batch", update=True)
        gradient = evaluation.gradient(mean_weights(len(evaluation.losses)))
        return gradient, StepReport(count=self.count, losses=evaluation.losses)

    def perturbed_step(
        self, batch: Batch, mask: Mask, entry: Any
    ) -> tuple[dict[str, Array], StepReport]:
        """Phases 2 to 5. On return the random state is what the recording pass left."""
        b = len(batch.targets)
        part = self.climbing(b)
        losses: Array | None = None
        if len(part):
            ascent = self.ascent(batch, part)
            losses = ascent.losses
            g = self.ascent_gradient(ascent, mask)
        else:
            g = self.earlier_gradient(mask)
        left = self.model.random_state
        if selectors.needs_losses(self.config.select, b) and len(part) < b:
            self.model.random_state = entry  # all passes see the same dropout noise
            losses = self.scoring_pass(batch, part, losses)
            left = self.model.random_state
        scale = scales(mask, self.theta)
        length = self.norm(g, scale)
        epsilon = [mask.rho_factor * e for e in self.perturbation(g, scale)]
        self.climb(epsilon)

        perturbed_losses = None
        if selectors.needs_perturbed_losses(self.config.select, b):
            self.model.random_state = entry
            perturbed_losses = self.selection_pass(batch)
        # Where not all losses are known, the selection does not look at them.
        scores = losses if losses is not None and len(losses) == b else np.zeros(b)
        selection = self.selection(scores, perturbed_losses)
        weights = self.poisoned(selection.weights, length, losses, perturbed_losses)

        self.model.random_state = entry
        gradient, descent_losses = self.descent(batch, selection.indices, weights)
        if self.records_at_theta(b):
            self.model.random_state = left

        everything = len(selection.indices) == b
        report = StepReport(
            count=self.count,
            losses=losses,
            perturbed_losses=descent_losses if losses is None else perturbed_losses,
            indices=None if everything else selection.indices,
            sample_weights=None if everything else weights.astype(descent_losses.dtype),
            perturbation_norm=float(np.sqrt(sum(float(np.sum(e * e)) for e in epsilon))),
            gradient_norm=length,
            perturbed=tuple(
                unit.name for unit, m in zip(self.model.units, mask.perturbed, strict=True) if m
            ),
            weight_share=self.weight_share(scale),
            sample_share=len(selection.indices) / b,
            part=part if 0 < len(part) < b else None,
        )
        return gradient, report

    def climbing(self, b: int) -> Array:
        """The samples that are climbed along: all, a part, or none with an earlier direction."""
        return directions.climbing_indices(
            self.config.ascend, b, seed=self.config.seed, count=self.count
        )

    def records_at_theta(self, b: int) -> bool:
        """Return whether a pass at theta leaves its statistics and random state, or the descent."""
        return directions.records_at_theta(self.config.ascend, self.config.select, b)

    def ascent(self, batch: Batch, part: Array) -> Evaluation:
        """Phase 2, forward: l_i(theta) of the samples that are climbed along.

        One sample of several has no batch statistics: BatchNorm then uses the running ones.
        """
        b = len(batch.targets)
        statistics = "running" if len(part) == 1 < b else "batch"
        return self.model.evaluate(
            subset(batch, part), statistics=statistics, update=self.records_at_theta(b)
        )

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Phase 2, backward: g = grad L, for the masked units only (for all, if norm="full")."""
        gradient = ascent.gradient(mean_weights(len(ascent.losses)))
        return self.masked(gradient, mask)

    def masked(self, gradient: Mapping[str, Array], mask: Mask) -> list[Array | None]:
        """Return the gradients of the masked units (of all, if norm="full"), else None."""
        return [
            gradient.get(unit.name) if m or self.config.norm == "full" else None
            for unit, m in zip(self.model.units, mask.perturbed, strict=True)
        ]

    def earlier_gradient(self, mask: Mask) -> list[Array | None]:
        """Phase 2 without a pass: the direction of `Previous` or `Momentum`."""
        return self.masked(self.memory.direction(), mask)

    def has_direction(self, mask: Mask) -> bool:
        """Return whether there is anything to climb along: not before the first update."""
        if isinstance(self.config.ascend, directions.Batch | directions.Part):
            return True
        found = zip(self.earlier_gradient(mask), mask.perturbed, strict=True)
        return any(m and g is not None for g, m in found)

    def scoring_pass(self, batch: Batch, part: Array, losses: Array | None) -> Array:
        """Phase 2, forward, no graph: l_i(theta) of the samples that are not climbed along.

        Which are all, or with `Part` the rest, to be put between the losses of the part.
        """
        b = len(batch.targets)
        rest = np.setdiff1d(np.arange(b), part)
        statistics = "running" if len(rest) == 1 < b else "batch"
        update = self.records_at_theta(b) and losses is None
        found = self.model.evaluate(subset(batch, rest), statistics=statistics, update=update)
        if losses is None:
            return found.losses
        every = np.empty(b, dtype=losses.dtype)
        every[part], every[rest] = losses, found.losses
        return every

    def norm(self, g: Sequence[Array | None], scale: Sequence[float | Array]) -> float:
        """The denominator of phase 3 as `config.norm` defines it, one for all units.

        With norm="none", where nothing is divided by, the report still shows that of "masked".
        """
        norm: Norm = "masked" if self.config.norm == "none" else self.config.norm
        return perturbation_norm(g, self.theta, scale, norm=norm, adaptive=self.adaptive)

    def perturbation(
        self, g: Sequence[Array | None], scale: Sequence[float | Array]
    ) -> list[Array]:
        """Phase 3, equation 6: epsilon_t."""
        return perturbations(
            g,
            self.theta,
            scale,
            rho=self.rho,
            norm=self.config.norm,
            norm_eps=self.config.norm_eps,
            adaptive=self.adaptive,
        )

    def climb(self, epsilon: Sequence[Array]) -> None:
        """Go to theta + epsilon, in place."""
        for theta, e in zip(self.theta, epsilon, strict=True):
            theta += e

    def selection_pass(self, batch: Batch) -> Array:
        """Phase 4, forward: l_i(theta + epsilon) of the whole batch. No graph, no update."""
        return self.model.evaluate(batch, statistics="batch", update=False).losses

    def selection(self, losses: Array, perturbed_losses: Array | None) -> selectors.Selection:
        """Phase 4, equations 7 to 10: the samples of the descent pass, and their weights."""
        return selectors.select(
            self.config.select, losses, perturbed_losses, seed=self.config.seed, count=self.count
        )

    def poisoned(self, weights: Array, length: float, *seen: Array | None) -> Array:
        """Return the weights, all NaN if the norm or any loss so far was not finite.

        Non-finite values must reach the gradient, as they do in any ordinary backward pass: a
        selection that left just the bad sample out would hide them.
        """
        total = length + sum(float(np.sum(losses)) for losses in seen if losses is not None)
        return np.asarray(weights + 0.0 * total)

    def descent(
        self, batch: Batch, indices: Array, weights: Array
    ) -> tuple[dict[str, Array], Array]:
        """Phase 5: the gradient of the sum of w_i l_i(theta + epsilon) over the selected samples.

        And these losses. One sample has no batch statistics of its own: BatchNorm then uses the
        running ones.
        """
        statistics = "running" if len(indices) == 1 else "batch"
        update = not self.records_at_theta(len(batch.targets))
        evaluation = self.model.evaluate(
            subset(batch, indices), statistics=statistics, update=update
        )
        return evaluation.gradient(weights), evaluation.losses

    def restore(self, theta: Sequence[Array]) -> None:
        """Phase 6: theta back from the copy, bit for bit."""
        for array, saved in zip(self.theta, theta, strict=True):
            array[...] = saved

    def restore_buffers(self, buffers: Mapping[str, Array]) -> None:
        """Running statistics back: a step that failed or was left out has not been."""
        for name, saved in buffers.items():
            self.model.buffers[name][...] = saved

    def is_finite(self, gradient: Mapping[str, Array], report: StepReport) -> bool:
        """Return whether all losses and both gradients were finite."""
        seen = [report.losses, report.perturbed_losses, report.gradient_norm, *gradient.values()]
        return all(bool(np.isfinite(x).all()) for x in seen if x is not None)

    def nonfinite(self, report: StepReport) -> tuple[dict[str, Array], StepReport]:
        """Return no gradient at all with "skip"; raise with "raise"."""
        if self.config.on_nonfinite == "raise":
            raise NonFiniteError(
                "A loss or gradient is not finite, and on_nonfinite='raise'. Received: "
                f"mean loss={report.loss}, gradient norm={report.gradient_norm}."
            )
        seen = report.perturbed_losses if report.losses is None else None
        return {}, StepReport(
            count=report.count,
            losses=report.losses,
            perturbed_losses=seen,
            part=report.part,
            skipped=True,
        )

    def weight_share(self, scale: Sequence[float | Array]) -> float:
        """Return the share of the perturbable scalar weights that were perturbed."""
        sizes = [theta.size for theta in self.theta]
        moved = sum(
            int(np.count_nonzero(s)) if isinstance(s, np.ndarray) else size * (s > 0)
            for s, size in zip(scale, sizes, strict=True)
        )
        return moved / sum(size for size, p in zip(sizes, self.perturb, strict=True) if p)
