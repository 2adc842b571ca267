"""The report of a step, and running means over steps.

A report holds arrays that the step computed anyway, on their device. Its properties are computed
when they are read, so an unread report costs nothing. Reading one does not synchronise with the
device; converting it to a Python number does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from esam_core.errors import ESAMTypeError

__all__ = ["REPORTED_MEANS", "RunningMeans", "StepReport"]

#: The scalar properties of a report, in display order.
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


@dataclass(frozen=True, eq=False)
class StepReport:
    """The report of one ESAM step. Fields that the step did not need to compute are None.

    Args:
        count: the step count, from 0.
        losses: (b,) losses at theta. With `Part`, if the selection does not need the other samples,
            (n,) losses of the samples in `part`. None if there was no pass at theta (`Previous` and
            `Momentum`).
        perturbed_losses: (b,) losses at theta + epsilon; None without a selection pass. If `losses`
            is None, the losses of the descent pass: (b,), or (k,) of the samples in `indices`.
        indices: (k,) indices of the selected samples, ascending; None if all were selected.
        sample_weights: (k,) weights of these samples in the descent pass; None if all were
            selected.
        perturbation_norm: ||epsilon||, a scalar; 0.0 for a base step.
        gradient_norm: ||g|| of the ascent, as `norm` defines it (that of "masked" with "none");
            None for a base step.
        perturbed: names of the perturbed units.
        weight_share: share of the perturbable scalar weights that were perturbed, in [0, 1].
        sample_share: share of the batch in the descent pass (the second gradient), in (0, 1].
        skipped: whether the step was skipped because a value in it was not finite.
        outputs: the other results of the user's function, in addition to the losses.
        part: (n,) indices of the samples in the ascent pass, ascending; None if these were all
            samples of the batch, or none.
        batch_size: b, the number of samples in the batch.

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
    batch_size: int | None = None

    @property
    def loss(self) -> Any:
        """The mean of the first losses that the step computed.

        This is L_B, the mean of the losses at theta. With `Part` it is the mean over the part if
        only those losses are known. With `Previous` and `Momentum`, if no losses at theta are
        known, it is the mean loss of the descent pass, at theta + epsilon.
        """
        seen = self.perturbed_losses if self.losses is None else self.losses
        return None if seen is None else self._mean(seen)

    @property
    def perturbed_loss(self) -> Any:
        """Mean loss at theta + epsilon, or None."""
        return None if self.perturbed_losses is None else self._mean(self.perturbed_losses)

    @property
    def increases(self) -> Any:
        """(b,) per-sample sharpness: the increase of each loss under the perturbation, or None."""
        if self.losses is None or self.perturbed_losses is None:
            return None
        return self._difference(self.perturbed_losses, self.losses)

    @property
    def sharpness(self) -> Any:
        """R_B: mean per-sample sharpness (equation 7), or None."""
        increases = self.increases
        return None if increases is None else self._mean(increases)

    @property
    def selected_sharpness(self) -> Any:
        """R_B+: mean sharpness of the selected samples (equation 8), or None."""
        increases = self.increases
        if increases is None or self.indices is None:
            return None
        return self._mean(self._take(increases, self.indices))

    @property
    def rejected_sharpness(self) -> Any:
        """R_B-: mean sharpness of the rejected samples (equation 8), or None."""
        increases = self.increases
        if increases is None or self.indices is None:
            return None
        rejected = len(self.losses) - len(self.indices)
        chosen = self._take(increases, self.indices)
        return (self._sum(increases) - self._sum(chosen)) / rejected

    @property
    def threshold(self) -> Any:
        """The threshold alpha, the k-th largest sharpness, or None."""
        increases = self.increases
        if increases is None or self.indices is None:
            return None
        return self._sorted(increases)[len(self.losses) - len(self.indices)]

    # Operations on arrays. `esam-keras` replaces them, because TensorFlow's tensors lack methods.

    def _difference(self, a: Any, b: Any) -> Any:
        return a - b

    def _mean(self, values: Any) -> Any:
        return values.mean()

    def _sum(self, values: Any) -> Any:
        return values.sum()

    def _take(self, values: Any, indices: Any) -> Any:
        return values[indices]

    def _sorted(self, values: Any) -> Any:
        return values[values.argsort()]


@dataclass
class RunningMeans:
    """Means of report fields over steps, kept on the device: `update` never synchronises.

    Values in half precision are added in float32. Skipped steps (`on_nonfinite="skip"`) are left
    out, because their losses may not be finite.

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
        if isinstance(self.fields, str):
            raise ESAMTypeError(
                "`fields` must be a sequence of names, such as ('loss', 'sharpness'). "
                f"Received: fields={self.fields!r}."
            )
        self.fields = tuple(self.fields)

    def update(self, report: StepReport) -> None:
        """Add one step. A field that the step did not compute is left out of its mean."""
        if report.skipped:
            return
        for name in self.fields:
            value = getattr(report, name)
            if value is not None:
                value = _widened(value)
                self._sums[name] = value + self._sums[name] if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + 1

    def result(self) -> dict[str, float]:
        """Return the means as Python numbers. Only this method synchronises with the device."""
        return {name: float(self._sums[name]) / self._counts[name] for name in self._sums}

    def reset(self) -> None:
        """Forget every step."""
        self._sums.clear()
        self._counts.clear()


def _widened(value: Any) -> Any:
    """Return a scalar in float32 or wider: a sum in half precision soon stops growing."""
    if getattr(getattr(value, "dtype", None), "itemsize", 4) >= 4:
        return value
    return value.astype("float32") if hasattr(value, "astype") else value.float()  # torch
