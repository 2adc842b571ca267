"""What a step works on, and what it finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from esam_core import ESAMConfig, Mask, StepReport
from esam_core.directions import records_at_theta
from esam_torch.batch import Samples
from esam_torch.directions import Climb
from esam_torch.inspection import Layout
from esam_torch.synchronisation import Ranks
from esam_torch.targets import Targets

__all__ = ["StepResult", "Task"]

#: The whole batch.
WHOLE = Climb()


@dataclass(frozen=True)
class Task:
    """What a step works on.

    Args:
        model: what `losses` calls.
        config: the hyperparameters.
        layout: what is known of the model.
        ranks: who else trains it.
        samples: takes samples out of batches.
        mask: the units that this step perturbs.
        targets: what follows from it; nothing perturbed means an ordinary base step.
        count: the number of this ascent.
        prune: whether to compute no gradients of what is not perturbed, in the ascent.
        watch_rounding: whether to measure how much of the perturbation rounds away.
        compare: whether to compare the selected samples' losses in the descent with those before.
        before_descent: called when only the last backward is left to be run.
        climb: along what the step climbs.
    """

    model: nn.Module
    config: ESAMConfig
    layout: Layout
    ranks: Ranks
    samples: Samples
    mask: Mask
    targets: Targets
    count: int
    prune: bool = True
    watch_rounding: bool = False
    compare: bool = False
    before_descent: Callable[[], None] | None = None
    climb: Climb = WHOLE

    @property
    def records_at_theta(self) -> bool:
        """Whether buffers and random state are left as a pass at theta does, or as the descent."""
        b, config = self.climb.batch_size, self.config
        if b is None:
            return self.climb.direction is None
        return records_at_theta(config.ascend, config.select, b)

    @property
    def perturbs(self) -> bool:
        """Whether anything is perturbed."""
        return bool(self.targets.tensors)


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Args:
        gradients: ESAM's gradient of each input; None where the loss does not depend on it, and
            everywhere if the step is skipped.
        report: what the step saw.
        rounded: the share of the perturbation that rounded away, 0-d, if it was asked for.
        disagreement: what the comparison says against `losses`, if it was asked for.
    """

    gradients: Sequence[Tensor | None]
    report: StepReport
    rounded: Tensor | None = None
    disagreement: str | None = None
