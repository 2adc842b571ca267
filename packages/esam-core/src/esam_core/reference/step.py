"""One ESAM step, slow and literal: the specification against which backends are checked.

`Step.backward` runs the phases in order. Each phase is a method, and each equation is a function in
`perturbation`, `selectors`, `directions` or this module.

Source: Du et al., ICLR 2022 (arXiv 2110.03141), algorithm 1 and equations 6 to 10. Comments mark
the rules that the paper leaves open.
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
from esam_core.reference.settings import checked_settings
from esam_core.report import StepReport
from esam_core.units import Mask

__all__ = ["Step", "mean_weights", "scales", "subset"]

Array = NDArray[Any]


def mean_weights(b: int) -> Array:
    """Return the b weights 1/b, with which the sum of w_i l_i is the mean loss L_B."""
    return np.full(b, 1.0 / b)


def subset(batch: Batch, indices: Array) -> Batch:
    """Return the samples of a batch at these indices, such as B+ of equation 8."""
    return Batch(batch.inputs[indices], batch.targets[indices])


def scales(mask: Mask, parameters: Sequence[Array]) -> list[float | Array]:
    """Return m_t / p_t of equation 6 for each unit, or for each weight if weights are drawn.

    Each backend draws masks of single weights with its own generator; only their distribution is
    the same.
    """
    if mask.weight_beta is None or mask.weight_seed is None:
        return list(mask.scale)
    result: list[float | Array] = []
    for t, (scale, theta) in enumerate(zip(mask.scale, parameters, strict=True)):
        drawn = uniforms(theta.size, seed=mask.weight_seed, count=0, stream=t) < mask.weight_beta
        # Use `where`, not a product: a scale may be inf, and 0 * inf is NaN.
        chosen = np.where(drawn.reshape(theta.shape), scale, 0.0)
        result.append(np.asarray(chosen, dtype=theta.dtype))
    return result


class Step:
    """ESAM for a NumPy model: everything except the base optimizer's update.

    Args:
        model: see `Model`.
        config: hyperparameters.
        settings: parameter name -> "rho", "adaptive" or "perturb", where they differ from the
            config.
        base: the base optimizer, whose first moments `Momentum` reads.

    Attributes:
        count: the count of the next step.
        memory: the ascent directions kept from earlier steps.

    Raises:
        ESAMValueError: `ascend=Momentum()`, and the base optimizer has no first moment.
        ESAMValueError, ESAMTypeError: a setting is invalid; the message names it.

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
        own = checked_settings(settings or {}, model.parameters)
        names = [unit.name for unit in model.units]
        self.rho = [own.get(n, {}).get("rho", config.rho) for n in names]
        self.adaptive = [own.get(n, {}).get("adaptive", config.adaptive) for n in names]
        self.perturb = [own.get(n, {}).get("perturb", True) for n in names]
        self.memory = Memory(config, model.units, self.perturb, base)

    @property
    def theta(self) -> list[Array]:
        """The T arrays theta_t themselves, not copies."""
        return [self.model.parameters[unit.name] for unit in self.model.units]

    def backward(self, batch: Batch) -> tuple[dict[str, Array], StepReport]:
        """Return the descent gradient and the report; the parameters are restored.

        Args:
            batch: b >= 1 samples.

        Returns:
            The gradients by name, to be added to existing gradients, and the report. The gradients
            are empty if a value was not finite and `on_nonfinite="skip"`.

        Raises:
            ESAMValueError: the batch is empty, or no pass would update the running statistics.
            NonFiniteError: a value was not finite, and `on_nonfinite="raise"`.
            BaseException: any exception from the model. Parameters, random state and count are then
                restored.
        """
        if len(batch.targets) == 0:
            raise ESAMValueError("The batch must not be empty. Received: a batch of 0 samples.")
        entry = self.model.forward_state
        buffers = {name: array.copy() for name, array in self.model.buffers.items()}
        theta = [array.copy() for array in self.theta]  # used to restore them bit for bit
        try:
            with np.errstate(all="ignore"):  # `on_nonfinite` handles values that are not finite
                mask = self.mask()
                if mask.active and self.has_direction(mask):
                    gradient, report = self.perturbed_step(batch, mask, entry)
                else:
                    gradient, report = self.base_step(batch)
            if self.config.on_nonfinite != "propagate" and not self.is_finite(gradient, report):
                gradient, report = self.nonfinite_result(report)
                self.restore_buffers(buffers)
        except BaseException:
            self.model.forward_state = entry
            self.restore_buffers(buffers)
            raise
        finally:
            self.restore(theta)
        self.count += 1
        return gradient, report

    def mask(self) -> Mask:
        """Phase 1: the mask of *this* step, without units that are excluded or have rho = 0."""
        units = self.model.units
        mask = self.config.perturb.draw(units, seed=self.config.seed, count=self.count)
        allowed = [p and r > 0.0 for p, r in zip(self.perturb, self.rho, strict=True)]
        return mask.within(allowed)

    def base_step(self, batch: Batch) -> tuple[dict[str, Array], StepReport]:
        """Return the ordinary gradient: for an empty mask, for rho = 0, or without a direction."""
        evaluation = self.model.evaluate(batch, statistics="batch", update=True)
        gradient = evaluation.gradient(mean_weights(len(evaluation.losses)))
        losses = evaluation.losses
        return gradient, StepReport(count=self.count, losses=losses, batch_size=len(losses))

    def perturbed_step(
        self, batch: Batch, mask: Mask, entry: Any
    ) -> tuple[dict[str, Array], StepReport]:
        """Phases 2 to 5. The random state ends as the pass that updates statistics leaves it."""
        b = len(batch.targets)
        self.check_statistics(b)
        part = self.ascent_indices(b)
        losses: Array | None = None
        if len(part):
            ascent = self.ascent(batch, part)
            losses = ascent.losses
            g = self.ascent_gradient(ascent, mask)
        else:
            g = self.earlier_gradient(mask)
        left = self.model.forward_state
        if selectors.needs_losses(self.config.select, b) and len(part) < b:
            self.model.forward_state = entry  # all passes use the same noise and state
            losses = self.scoring_pass(batch, part, losses)
            if not len(part):
                left = self.model.forward_state
        scale = scales(mask, self.theta)
        length = self.norm(g, scale)
        epsilon = [mask.rho_factor * e for e in self.perturbation(g, scale)]
        self.apply_perturbation(epsilon)

        perturbed_losses = None
        if selectors.needs_perturbed_losses(self.config.select, b):
            self.model.forward_state = entry
            perturbed_losses = self.selection_pass(batch)
        # If not all losses are known, the selection does not use them.
        scores = losses if losses is not None and len(losses) == b else np.zeros(b)
        selection = self.selection(scores, perturbed_losses)
        weights = self.weights_or_nan(selection.weights, length, losses, perturbed_losses)

        self.model.forward_state = entry
        gradient, descent_losses = self.descent(batch, selection.indices, weights)
        if self.records_at_theta(b):
            self.model.forward_state = left

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
            batch_size=b,
        )
        return gradient, report

    def ascent_indices(self, b: int) -> Array:
        """The samples in the ascent pass: all, a part, or none with `Previous` and `Momentum`."""
        return directions.climbing_indices(
            self.config.ascend, b, seed=self.config.seed, count=self.count
        )

    def records_at_theta(self, b: int) -> bool:
        """Return whether a pass at theta updates the running state, and not the descent pass."""
        return directions.records_at_theta(self.config.ascend, self.config.select, b)

    def check_statistics(self, b: int) -> None:
        """Raise if no pass would update the running statistics of the model."""
        if self.model.has_statistics:
            directions.check_statistics(self.config.ascend, self.config.select, b)

    def ascent(self, batch: Batch, part: Array) -> Evaluation:
        """Phase 2, forward pass: l_i(theta) of the samples in the ascent pass.

        A single sample of a larger batch has no batch statistics: BatchNorm then uses the running
        statistics.
        """
        b = len(batch.targets)
        statistics = "running" if len(part) == 1 < b else "batch"
        return self.model.evaluate(
            subset(batch, part), statistics=statistics, update=self.records_at_theta(b)
        )

    def ascent_gradient(self, ascent: Evaluation, mask: Mask) -> list[Array | None]:
        """Phase 2, backward pass: g = grad L of the units in the mask (of all, if norm="full")."""
        gradient = ascent.gradient(mean_weights(len(ascent.losses)))
        return self.masked_gradients(gradient, mask)

    def masked_gradients(self, gradient: Mapping[str, Array], mask: Mask) -> list[Array | None]:
        """Return the gradients of the units in the mask (of all, if norm="full"), else None."""
        return [
            gradient.get(unit.name) if m or self.config.norm == "full" else None
            for unit, m in zip(self.model.units, mask.perturbed, strict=True)
        ]

    def earlier_gradient(self, mask: Mask) -> list[Array | None]:
        """Phase 2 without a pass: the direction of `Previous` or `Momentum`."""
        return self.masked_gradients(self.memory.direction(), mask)

    def has_direction(self, mask: Mask) -> bool:
        """Return whether there is an ascent direction; there is none before the first update."""
        if isinstance(self.config.ascend, directions.Batch | directions.Part):
            return True
        found = zip(self.earlier_gradient(mask), mask.perturbed, strict=True)
        return any(m and g is not None for g, m in found)

    def scoring_pass(self, batch: Batch, part: Array, losses: Array | None) -> Array:
        """Phase 2, without gradients: l_i(theta) of the samples outside the ascent pass.

        Returns the losses of all samples, in order: with `Part`, merged with those of the part.
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

        With norm="none" there is no denominator; the report then shows that of "masked".
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

    def apply_perturbation(self, epsilon: Sequence[Array]) -> None:
        """Add epsilon to theta, in place."""
        for theta, e in zip(self.theta, epsilon, strict=True):
            theta += e

    def selection_pass(self, batch: Batch) -> Array:
        """Phase 4: l_i(theta + epsilon) of the whole batch, without gradients or an update."""
        return self.model.evaluate(batch, statistics="batch", update=False).losses

    def selection(self, losses: Array, perturbed_losses: Array | None) -> selectors.Selection:
        """Phase 4, equations 7 to 10: the samples of the descent pass, and their weights."""
        return selectors.select(
            self.config.select, losses, perturbed_losses, seed=self.config.seed, count=self.count
        )

    def weights_or_nan(self, weights: Array, length: float, *seen: Array | None) -> Array:
        """Return the weights, all NaN if the norm or any loss so far was not finite.

        Non-finite values must reach the gradient, as in any ordinary backward pass. A selection
        that left out only the bad sample would hide them.
        """
        total = length + sum(float(np.sum(losses)) for losses in seen if losses is not None)
        return np.asarray(weights + 0.0 * total)

    def descent(
        self, batch: Batch, indices: Array, weights: Array
    ) -> tuple[dict[str, Array], Array]:
        """Phase 5: the gradient of the sum of w_i l_i(theta + epsilon) over the selected samples.

        Returns these losses too. A single sample of a larger batch has no batch statistics:
        BatchNorm then uses the running statistics.
        """
        b = len(batch.targets)
        statistics = "running" if len(indices) == 1 < b else "batch"
        update = not self.records_at_theta(b)
        evaluation = self.model.evaluate(
            subset(batch, indices), statistics=statistics, update=update
        )
        return evaluation.gradient(weights), evaluation.losses

    def restore(self, theta: Sequence[Array]) -> None:
        """Phase 6: restore theta from the copy, bit for bit."""
        for array, saved in zip(self.theta, theta, strict=True):
            array[...] = saved

    def restore_buffers(self, buffers: Mapping[str, Array]) -> None:
        """Restore the running statistics after a step that failed or was skipped."""
        for name, saved in buffers.items():
            self.model.buffers[name][...] = saved

    def is_finite(self, gradient: Mapping[str, Array], report: StepReport) -> bool:
        """Return whether all losses and both gradients were finite."""
        seen = [report.losses, report.perturbed_losses, report.gradient_norm, *gradient.values()]
        return all(bool(np.isfinite(x).all()) for x in seen if x is not None)

    def nonfinite_result(self, report: StepReport) -> tuple[dict[str, Array], StepReport]:
        """Return an empty gradient for "skip"; raise NonFiniteError for "raise"."""
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
            batch_size=report.batch_size,
        )

    def weight_share(self, scale: Sequence[float | Array]) -> float:
        """Return the share of the perturbable scalar weights that were perturbed."""
        sizes = [theta.size for theta in self.theta]
        moved = sum(
            int(np.count_nonzero(s)) if isinstance(s, np.ndarray) else size * (s > 0)
            for s, size in zip(scale, sizes, strict=True)
        )
        return moved / sum(size for size, p in zip(sizes, self.perturb, strict=True) if p)
