"""What a step reports, and running means of it.

A report holds the arrays that the step had in hand anyway, on their device. Its properties are
computed when they are read: a report that nobody reads costs nothing, and none of them waits
for the device until it is turned into a Python number.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["REPORTED_MEANS", "RunningMeans", "StepReport"]

#: The scalar properties of a report, in the order in which tables show them.
REPORTED_MEANS = (
    "loss",
    "perturbed_loss",
    "sharpness",
    "selected_sharpness",
    "rejected_sharpness",
    "threshold",
    "perturbation_norm",
    "gradient_norm",
    "weight_share",
    "sample_share",
)


@dataclass(frozen=True)
class StepReport:
    """What one ESAM step saw. Fields that the step had no reason to compute are None.

    Args:
        count: the number of this ascent, from 0.
        losses: losses at theta: (b,); with `Part`, where the selection does not need those of the
            other samples, (n,) of the samples in `part`; None where no pass at theta was made
            (`Previous` and `Momentum`).
        perturbed_losses: (b,) losses at theta + epsilon; None without a selection pass. Where
            `losses` are None, those of the descent: (b,), or (k,) of the samples in `indices`.
        indices: (k,) indices of the selected samples, ascending; None if all were selected.
        sample_weights: (k,) their weights in the descent pass; None if all were selected.
        perturbation_norm: ||epsilon||, a scalar; 0.0 for a base step.
        gradient_norm: ||g|| of the ascent, as `norm` defines it; None for a base step.
        perturbed: names of the perturbed units.
        weight_share: share of the perturbable scalar weights that were perturbed, in [0, 1].
        sample_share: share of the batch in the descent pass, in (0, 1].
        skipped: whether the step was left out because something in it was not finite.
        outputs: whatever the user's function returned beside the losses.
        part: (n,) indices of the samples that were climbed along, ascending; None if it was the
            whole batch, or no sample of this step.

    Example:
        >>> import numpy as np
        >>> report = StepReport(
        ...     count=0,
        ...     losses=np.array([1.0, 1.0, 1.0, 1.0]),
        ...     perturbed_losses=np.array([1.5, 1.25, 1.0, 2.0]),
        ...     indices=np.array([0, 3]),
        ... )
        >>> float(report.sharpness), float(report.selected_sharpness), float(report.threshold)
        (0.4375, 0.75, 0.5)
    """

    count: int
    losses: Any
    perturbed_losses: Any = None
    indices: Any = None
    sample_weights: Any = None
    perturbation_norm: Any = 0.0
    gradient_norm: Any = None
    perturbed: tuple[str, ...] = ()
    weight_share: float = 0.0
    sample_share: float = 1.0
    skipped: bool = False
    outputs: Any = None
    part: Any = None

    @property
    def loss(self) -> Any:
        """The mean loss that the step saw first.

        L_B, the mean of the losses at theta; with `Part`, where only the part's are known, theirs;
        with `Previous` and `Momentum`, where none are, that of the descent, at theta + epsilon.
        """
        return self.perturbed_losses.mean() if self.losses is None else self.losses.mean()

    @property
    def perturbed_loss(self) -> Any:
        """Mean loss at theta + epsilon, or None."""
        return None if self.perturbed_losses is None else self.perturbed_losses.mean()

    @property
    def increases(self) -> Any:
        """(b,) per-sample sharpness: the rise of each loss under the perturbation, or None."""
        if self.losses is None or self.perturbed_losses is None:
            return None
        return self.perturbed_losses - self.losses

    @property
    def sharpness(self) -> Any:
        """R_B: mean per-sample sharpness (equation 7), or None."""
        increases = self.increases
        return None if increases is None else increases.mean()

    @property
    def selected_sharpness(self) -> Any:
        """R_B+: mean sharpness of the selected samples (equation 8), or None."""
        increases = self.increases
        if increases is None or self.indices is None:
            return None
        return increases[self.indices].mean()

    @property
    def rejected_sharpness(self) -> Any:
        """R_B-: mean sharpness of the rejected samples (equation 8), or None."""
        increases = self.increases
        if increases is None or self.indices is None:
            return None
        rejected = len(self.losses) - len(self.indices)
        return (increases.sum() - increases[self.indices].sum()) / rejected

    @property
    def threshold(self) -> Any:
        """Alpha: the k-th largest sharpness, or None."""
        increases = self.increases
        if increases is None or self.indices is None:
            return None
        place = len(self.losses) - len(self.indices)
        # One index in an array: a lone one, torch would bring to the host, and wait for.
        return increases[increases.argsort()[place : place + 1]][0]


@dataclass
class RunningMeans:
    """Means of report fields over steps, kept on the device: `update` never waits for it.

    Args:
        fields: names of scalar report fields; default `REPORTED_MEANS`.

    Example:
        >>> import numpy as np
        >>> means = RunningMeans(("loss",))
        >>> means.update(StepReport(count=0, losses=np.array([1.0, 3.0])))
        >>> means.update(StepReport(count=1, losses=np.array([4.0])))
        >>> means.result()
        {'loss': 3.0}
    """

    fields: Iterable[str] = REPORTED_MEANS
    _sums: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.fields = tuple(self.fields)

    def update(self, report: StepReport) -> None:
        """Add one step. Steps that did not compute a field do not count for it."""
        for name in self.fields:
            value = getattr(report, name)
            if value is not None:
                self._sums[name] = value + self._sums[name] if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + 1

    def result(self) -> dict[str, float]:
        """Return the means as Python numbers; here, and only here, the device is waited for."""
        return {name: float(self._sums[name]) / self._counts[name] for name in self._sums}

    def reset(self) -> None:
        """Forget every step."""
        self._sums.clear()
        self._counts.clear()
