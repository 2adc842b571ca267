"""The inputs and the result of a step."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from esam_core import ESAMConfig, ESAMValueError, Mask, StepReport
from esam_core.directions import check_statistics, records_at_theta
from esam_core.selectors import needs_losses, subset_size
from esam_torch.batch import Samples
from esam_torch.directions import Climb
from esam_torch.guards import shares_statistics, statistics_layers
from esam_torch.inspection import Layout
from esam_torch.perturbation import Ascent, draw_weight_masks, perturb
from esam_torch.selection import Selected, select
from esam_torch.synchronisation import Ranks, agree_on_samples
from esam_torch.targets import Targets

__all__ = ["StepResult", "Task", "nothing", "report_of"]


def nothing() -> None:
    """Do nothing before the descent."""


@dataclass(frozen=True)
class Task:
    """The inputs of a step.

    Args:
        model: the model that `losses` calls.
        config: the hyperparameters.
        layout: the model's layout.
        ranks: the ranks that train it.
        samples: selects samples from batches.
        mask: the units that this step perturbs.
        targets: the targets of the mask; without any, the step is a base step.
        count: the step count.
        prunes: whether the ascent pass computes only the gradients of perturbed parameters.
        watch_rounding: whether to measure how much of the perturbation is rounded away.
        compare: whether to find if a sample's loss depends on the other samples, which takes two
            forwards.
        before_descent: called when only the last backward remains.
        climb: the ascent direction.

    Raises:
        ESAMValueError: no pass would update the running statistics of the model's BatchNorm layers.
    """

    model: nn.Module
    config: ESAMConfig
    layout: Layout
    ranks: Ranks
    samples: Samples
    mask: Mask
    targets: Targets
    count: int
    prunes: bool
    watch_rounding: bool
    compare: bool
    before_descent: Callable[[], None]
    climb: Climb

    def __post_init__(self) -> None:
        b = self.climb.batch_size
        if b is None:
            return
        try:
            check_statistics(self.config.ascend, self.config.select, b)
        except ESAMValueError:  # for BatchNorm layers; to look for them first takes longer
            if any(getattr(layer, "track_running_stats", True) for layer in self.statistics_layers):
                raise

    @functools.cached_property
    def _modules(self) -> list[nn.Module]:
        """The model's modules in this step."""
        return list(self.model.modules())

    @property
    def statistics_layers(self) -> list[nn.Module]:
        """The layers in training mode that normalise by this rank's batch statistics."""
        others = self.layout.writes.statistics_layers
        return [*statistics_layers(self._modules), *(layer for layer in others if layer.training)]

    @property
    def records_at_theta(self) -> bool:
        """Whether a pass at theta, rather than the descent pass, updates the running state."""
        b, config = self.climb.batch_size, self.config
        if b is None:
            return self.climb.direction is None
        if self.climb.direction is not None:
            return self.scores(b)
        return records_at_theta(config.ascend, config.select, b)

    @property
    def perturbs(self) -> bool:
        """Whether anything is perturbed."""
        return bool(self.targets.tensors)

    @property
    def calls_again(self) -> bool:
        """Whether passes that call `losses` follow after the loss has been computed."""
        return self.perturbs and self.climb.direction is None

    def epsilon(self, gradients: list[Tensor], losses: Tensor, scale: Tensor) -> Ascent:
        """Return the perturbation; the arguments are those of `perturb`."""
        return perturb(
            gradients,
            self.targets,
            losses,
            scale,
            norm=self.config.norm,
            norm_eps=self.config.norm_eps,
            weight_masks=draw_weight_masks(self.mask, self.targets.tensors),
        )

    # -- which passes run -------------------------------------------------------------------------

    def scores(self, b: int) -> bool:
        """Return whether the losses of all b samples at theta are computed, for the selection."""
        return needs_losses(self.config.select, b) or self._others_score

    def scores_the_rest(self, b: int) -> bool:
        """Return whether a pass computes losses at theta of the samples outside the part."""
        if self.climb.part is not None:
            return self.scores(b)
        return self.config.climbs_on_part and self._others_score

    def smallest_pass(self, b: int) -> int:
        """Return the number of samples in the smallest pass with a graph."""
        part = self.climb.part
        return min(subset_size(self.config.select.gamma, b), b if part is None else len(part))

    def compares(self, b: int) -> bool:
        """Return whether the losses of some samples are computed with and without the others.

        With FSDP2, all ranks run the same passes, even one with too few samples to compare.
        """
        shared = self.layout.shards is not None
        return self.compare and (self.smallest_pass(b) < b or shared)

    def scores_perturbed(self, b: int) -> bool:
        """Return whether the selection pass runs, with all b samples at theta + epsilon."""
        return self.config.select.score == "increase" and self.scores(b)

    @functools.cached_property
    def _others_score(self) -> bool:
        """Whether ranks with larger batches may score samples, and wait for this rank meanwhile.

        They wait in each forward if weights are sharded or batch statistics are shared. A rank
        whose own batch is too small for a selection must then run the same passes.
        """
        selector = self.config.select
        if selector.score is None or selector.gamma == 1.0:
            return False
        return self.layout.shards is not None or any(map(shares_statistics, self._modules))

    def select(self, b: int, losses: Tensor, perturbed_losses: Tensor | None) -> Selected:
        """Return the samples of the descent pass, if these are not all of the b samples.

        Args:
            b: the number of samples.
            losses: (b,) losses at theta; of any length if the selector does not use them.
            perturbed_losses: (b,) losses at theta + epsilon, or None if they are not needed.
        """
        selector, seed = self.config.select, self.config.seed
        own = select(selector, b, losses, perturbed_losses, seed=seed, count=self.count)
        return agree_on_samples(own, self.layout.groups_sharing_a_batch)


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Args:
        gradients: ESAM's gradient of each input; None where the loss does not depend on it, and
            everywhere if the step is skipped.
        report: the step's report.
        rounded: the share of the perturbation that was rounded away, 0-d, if `watch_rounding`.
        disagreement: a warning about `losses` from the comparison, if there was one.
        compared: whether there was a comparison.
    """

    gradients: Sequence[Tensor | None]
    report: StepReport
    rounded: Tensor | None = None
    disagreement: str | None = None
    compared: bool = False

    def skipped(self) -> "StepResult":
        """Return the result of a step that adds nothing, because a value was not finite."""
        seen = self.report
        report = StepReport(
            count=seen.count,
            losses=seen.losses,
            perturbed_losses=seen.perturbed_losses if seen.losses is None else None,
            skipped=True,
            outputs=seen.outputs,
            part=seen.part,
            batch_size=seen.batch_size,
        )
        return replace(self, gradients=[None] * len(self.gradients), report=report)


def report_of(
    task: Task,
    b: int,
    outputs: Any,
    before: Tensor | None,
    after: Tensor | None = None,
    selected: Selected | None = None,
    ascent: Ascent | None = None,
) -> StepReport:
    """Return the report of a step.

    Args:
        task: the inputs of the step.
        b: the number of samples.
        outputs: the other outputs of `losses`.
        before: the losses at theta, if there are any.
        after: the losses at theta + epsilon, if there are any.
        selected: the samples of the descent pass, or None if these are all.
        ascent: the perturbation, or None in a base step.
    """
    return StepReport(
        count=task.count,
        losses=before,
        perturbed_losses=after,
        indices=None if selected is None else selected.indices,
        sample_weights=None if selected is None else selected.weights,
        perturbation_norm=0.0 if ascent is None else ascent.perturbation_norm,
        gradient_norm=None if ascent is None else ascent.gradient_norm,
        perturbed=task.targets.names,
        weight_share=task.targets.weight_share,
        sample_share=1.0 if selected is None else len(selected.indices) / b,
        outputs=outputs,
        part=task.climb.part,
        batch_size=b,
    )
