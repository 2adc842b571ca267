"""A step with an ascent direction from earlier steps: no ascent pass, one pass with a graph.

The forward of the descent pass, at theta + epsilon, runs when the loss is computed, so that its
backward can be part of the user's backward. In between the weights are at theta. The backward
moves them to exactly the same theta + epsilon again, and restores them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esam_core.selectors import subset_size
from esam_torch.devices import on_device
from esam_torch.finiteness import flaw_in, nan_if_flawed
from esam_torch.guards import RandomState
from esam_torch.perturbation import Ascent
from esam_torch.selection import Selected
from esam_torch.step import Step
from esam_torch.task import StepResult, report_of
from esam_torch.values import widened
from esam_torch.written import Kept

__all__ = ["EarlierStep"]


class EarlierStep(Step):
    """A step whose task contains the ascent direction."""

    _at_the_descent: Kept | None = None
    _before: Tensor | None = None
    _after: Tensor | None = None
    _selected_samples: Selected | None = None
    _rounded: Tensor | None = None
    _ascent_found: Ascent

    @property
    def value(self) -> Tensor:
        """The mean loss at theta if the selection needs it, else that of the descent pass."""
        return self._mean.detach() if self._before is None else self._before.mean()

    def _first_pass(self) -> Tensor:
        """Run all passes up to the forward of the descent pass, and return its loss."""
        task, b = self.task, self.task.climb.batch_size
        if b is not None and task.scores(b):
            self._before = self._without_a_graph(b)
        left, self._written = RandomState(task.layout.devices), task.layout.writes.keep()
        self._ascent_found = ascent = self._direction()
        flaw = ascent.flaw
        with self._at_the_peak(ascent) as weights:
            if task.watch_rounding:
                self._rounded = weights.share_rounded_away(ascent.perturbations)
            if b is not None:
                leaves_out = subset_size(task.config.select.gamma, b) < b
                if leaves_out:
                    task.samples.check(self._batch, b)
                self._compare(b)
                if task.scores_perturbed(b):
                    self._random.restore()
                    self._after = self._without_a_graph(b)
                    flaw = on_device(flaw, self._after.device) + flaw_in(self._after)
                if leaves_out:
                    self._selected_samples = task.select(b, self._losses_at_theta(), self._after)
            self._random.restore()
            total, self._values, self._outputs = self._descent_loss(self._selected_samples)
        self._first.note()
        if task.records_at_theta:
            self._at_the_descent = task.layout.writes.keep()
            self._written.restore()
            left.restore()
        # Non-finite values must reach the gradient, even if all selected samples are finite.
        return nan_if_flawed(total, on_device(flaw, total.device))

    def _direction(self) -> Ascent:
        """Return epsilon, computed from the direction of earlier steps."""
        task = self.task
        seen = self._losses_at_theta()
        return task.epsilon(task.climb.direction or [], seen, torch.ones((), device=seen.device))

    def _losses_at_theta(self) -> Tensor:
        """Return the losses at theta, or a finite number if there are none."""
        if self._before is not None:
            return self._before
        like = self.task.targets.tensors[0]
        dtype = widened(like.real.dtype if like.is_complex() else like.dtype)
        return torch.zeros(1, dtype=dtype, device=like.device)

    def _perturbed_step(self, scale: Tensor, inputs: Sequence[Tensor]) -> StepResult:
        """Run the backward of the descent pass, at the weights of its forward."""
        self.task.before_descent()
        at_the_descent = self._at_the_descent
        found = self.task.layout.writes.keep()  # checkpointed parts run again, and write again
        with self._at_the_peak(self._ascent_found):
            self._ascent_found.perturbations.clear()  # epsilon is in the weights
            if at_the_descent is not None:  # the graph may read buffers that its forward wrote
                at_the_descent.restore()
            gradients = self._gradients(self._mean, scale, inputs)
        found.restore()
        seen = self._values.detach().clone() if self._before is None else self._after
        report = report_of(
            self.task,
            self.batch_size,
            self._outputs,
            self._before,
            seen,
            self._selected_samples,
            self._ascent_found,
        )
        return StepResult(gradients, report, self._rounded, *self._comparison)
