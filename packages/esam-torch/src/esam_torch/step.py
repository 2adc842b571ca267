"""One step, pass by pass: ascent, perturbation, selection, descent, restore.

Reads top to bottom as the table in the documentation does; each pass is one method. The ascent's
forward is a method of its own (`ascend`), since the user's script computes the loss first and
calls its backward later, which runs the rest (`finish`). Whatever fails or interrupts, weights,
buffers and random state are as they were.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMConfig, ESAMValueError, Mask, NonFiniteError, StepReport
from esam_core.selectors import subset_size
from esam_torch.agreement import buffer_versions, comparable, disagreement
from esam_torch.ascent import ascent_gradients, gradients_of
from esam_torch.batch import Batch, Samples
from esam_torch.containers import detached
from esam_torch.finiteness import all_finite, poisoned
from esam_torch.guards import (
    Autocast,
    Buffers,
    RandomState,
    Weights,
    running_statistics,
    without_gradients,
)
from esam_torch.inspection import Layout
from esam_torch.losses import LossFunction, per_sample
from esam_torch.notes import PRUNED, WITHOUT_A_GRAPH, noted
from esam_torch.perturbation import Ascent, draw_weight_masks, perturb
from esam_torch.selection import Selected, select
from esam_torch.synchronisation import Ranks
from esam_torch.targets import Targets

__all__ = ["Step", "StepResult", "Task"]


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


class Step:
    """One step on one batch.

    Args:
        task: what to work on.
        losses: the user's function.
        batch: its arguments and keyword arguments.
    """

    def __init__(self, task: Task, losses: LossFunction, batch: Batch) -> None:
        self.task = task
        self._losses = losses
        self._batch = batch
        self._weights: Weights | None = None
        self._comparable = False
        self._disagreement: str | None = None
        self._values: Tensor
        self._mean: Tensor
        self._outputs: Any

    # -- the two halves ---------------------------------------------------------------------------

    def ascend(self) -> Tensor:
        """Run the forward of the ascent and return the mean loss at theta, with its graph."""
        layout, ranks = self.task.layout, self.task.ranks
        if layout.shards is not None:
            layout.shards.check_reducing()
            layout.shards.reshard()  # the base optimizer has changed the weights since
        self._random = RandomState(layout.devices)
        self._buffers = Buffers(layout.buffers)
        self._autocast = Autocast(layout.devices)
        self._synchronised = ranks.synchronised
        ranks.note_forward()
        versions = buffer_versions(self.task.model) if self.task.compare else []
        try:
            with self._climbing():
                self._values, self._outputs = self._forward(self.task.samples.bare(self._batch))
            if self.task.compare:
                wrote = buffer_versions(self.task.model) != versions
                drew = self._random.moved()
                self._comparable = comparable(self.task.model, drew=drew, wrote=wrote)
            if self.task.perturbs and self._selected < len(self._values):
                self.task.samples.check(self._batch, len(self._values))
            self._mean = self._values.mean()
        except BaseException:
            self.undo()
            raise
        return self._mean

    def finish(self, scale: Tensor, inputs: Sequence[Tensor]) -> StepResult:
        """Run what is left of the step, and return its gradient.

        Args:
            scale: 0-d, the gradient of what is minimised with respect to the mean loss.
            inputs: the tensors whose gradients are wanted.
        """
        with torch.enable_grad(), self._autocast.restored():
            if self.task.perturbs:
                result = self._perturbed_step(scale, inputs)
            else:
                result = self._base_step(scale, inputs)
            return self._checked(result)

    def finish_base(self) -> StepResult:
        """Return what a base step found whose gradient the script's own backward computes."""
        if self.task.before_descent is not None:
            self.task.before_descent()
        return StepResult((), self._base_report())

    def undo(self) -> None:
        """Put back everything that the step may have changed."""
        for parameter in self._switched_off():
            parameter.requires_grad_(True)
        if self._weights is not None:
            self._weights.restore()
            self._weights_changed()
        self._random.restore()
        self._buffers.restore()

    # -- passes -----------------------------------------------------------------------------------

    def _base_step(self, scale: Tensor, inputs: Sequence[Tensor]) -> StepResult:
        """Nothing is perturbed: the backward of the pass that has been run, and no more."""
        if self.task.before_descent is not None:
            self.task.before_descent()
        total = poisoned(self._mean, torch.isfinite(self._values.detach()).all())
        return StepResult(self._gradients(total, scale, inputs), self._base_report())

    def _perturbed_step(self, scale: Tensor, inputs: Sequence[Tensor]) -> StepResult:
        """Passes 2 to 6 of the step."""
        task, random = self.task, RandomState(self.task.layout.devices)
        buffers = Buffers(task.layout.buffers)  # as the pass at theta has left them
        b, k = len(self._values), self._selected
        with self._climbing():
            ascent = self._ascent(scale)
        # A clone: where a compiled model replays CUDA graphs, the next pass writes over the losses.
        before = self._values.detach().clone()
        del self._values, self._mean
        finite = ascent.finite
        self._weights = weights = Weights(task.targets.tensors)
        after: Tensor | None = None
        selected: Selected | None = None
        rounded: Tensor | None = None
        try:
            weights.add(ascent.perturbations)
            self._weights_changed()
            if task.watch_rounding:
                rounded = weights.rounded(ascent.perturbations)
            ascent.perturbations.clear()  # epsilon is in the weights; its memory is not needed
            if k < b:
                if task.config.select.score == "increase":
                    self._random.restore()
                    after = self._selection(b)
                    buffers.restore()  # BatchNorm may be about to read its running statistics
                    finite = finite & torch.isfinite(after).all()
                selected = select(
                    task.config.select, before, after, seed=task.config.seed, count=task.count
                )
            self._random.restore()
            gradients = self._descent(b, selected, finite, scale, inputs, after)
        finally:
            weights.restore()
            self._weights_changed()
        buffers.restore()
        random.restore()
        report = self._report(before, after, selected, ascent)
        return StepResult(gradients, report, rounded, self._disagreement)

    def _ascent(self, scale: Tensor) -> Ascent:
        """Return epsilon, from the gradient of the mean loss for the perturbed units."""
        task, targets = self.task, self.task.targets
        wanted = [*targets.tensors]
        if task.config.norm == "full":  # of all that is trained, whether it may be perturbed or not
            wanted += targets.idle
        loss = self._mean
        if task.layout.shards is not None:
            # Ranks share one epsilon, so all must see a loss that is not finite on one of them.
            loss = poisoned(loss, torch.isfinite(self._values.detach()).all())
        found = ascent_gradients(loss, wanted, scale, every=self._every())
        return perturb(
            found,
            targets,
            self._values.detach(),
            scale,
            norm=task.config.norm,
            norm_eps=task.config.norm_eps,
            weight_masks=draw_weight_masks(task.mask, targets.tensors),
        )

    def _selection(self, b: int) -> Tensor:
        """Return the (b,) losses at theta + epsilon; builds no graph."""
        with (
            torch.no_grad(),
            self.task.ranks.apart(),
            noted(WITHOUT_A_GRAPH, RuntimeError, "does not require grad"),
        ):
            values, _ = self._forward(self.task.samples.bare(self._batch), expected=b)
        return values.clone()

    def _descent(
        self,
        b: int,
        selected: Selected | None,
        finite: Tensor,
        scale: Tensor,
        inputs: Sequence[Tensor],
        after: Tensor | None,
    ) -> Sequence[Tensor | None]:
        """Return the gradient of the weighted losses of the selected samples at theta + epsilon."""
        samples = self.task.samples
        with contextlib.ExitStack() as stack:
            if not self._synchronised:
                stack.enter_context(self.task.ranks.apart())
            if selected is None:
                values, _ = self._forward(samples.bare(self._batch), expected=b)
                total = values.mean()
            else:
                k = len(selected.indices)
                if k == 1:
                    stack.enter_context(running_statistics(self.task.model))
                part = samples.take(self._batch, selected.indices, b)
                with noted(samples.note(self._batch, k, b), Exception):
                    values, _ = self._forward(part, expected=k)
                if self._comparable and after is not None:
                    self._disagreement = disagreement(after, selected.indices, values)
                total = (selected.weights * values).sum()
        if self.task.before_descent is not None:
            self.task.before_descent()
        # What was not finite must be seen in the gradient, even if the selected samples are not it.
        total = poisoned(total, finite & torch.isfinite(total.detach()))
        return self._gradients(total, scale, inputs)

    def _forward(self, batch: Batch, expected: int | None = None) -> tuple[Tensor, Any]:
        """Return (b,) losses with their graph, and what else the user's function returned."""
        args, kwargs = batch
        # Where the script holds autocast open around the step, casts of the weights are kept
        # between passes: of other weights, or of the same without a graph.
        torch.clear_autocast_cache()
        found, closure = self._losses(*args, **kwargs), not (args or kwargs)
        values, outputs = per_sample(found, expected=expected, closure=closure)
        outputs = detached(outputs)  # or a kept report would keep the graph
        if torch.is_grad_enabled() and not values.requires_grad:
            raise ESAMValueError(
                "`losses` must depend on the model's parameters. Received: losses without a graph. "
                "Were they detached, computed under torch.no_grad(), or by a reentrant checkpoint "
                "(give it use_reentrant=False)?"
            )
        return values, outputs

    # -- what the passes need ---------------------------------------------------------------------

    @property
    def _selected(self) -> int:
        """How many samples the descent takes."""
        return subset_size(self.task.config.select.gamma, len(self._values))

    @contextlib.contextmanager
    def _climbing(self) -> Any:
        """Compute gradients of perturbed weights alone, on this rank alone, while this lasts."""
        with contextlib.ExitStack() as stack:
            if self.task.perturbs:
                stack.enter_context(self.task.ranks.apart())
                off = self._switched_off()
                if off:
                    stack.enter_context(without_gradients(off))
                    stack.enter_context(noted(PRUNED, RuntimeError, "does not require grad"))
            yield

    def _switched_off(self) -> Sequence[Tensor]:
        """Return the trained parameters of which the ascent computes no gradients."""
        task = self.task
        whole = task.config.norm == "full" or task.layout.shards is not None or not task.prune
        return () if whole or not task.perturbs else task.targets.idle

    def _every(self) -> Sequence[Tensor] | None:
        """Return all parameters with a gradient if the model is sharded, else None."""
        layout = self.task.layout
        if layout.shards is None:
            return None
        return [p for p in (*layout.tensors, *layout.others) if p.requires_grad]

    def _gradients(
        self, total: Tensor, scale: Tensor, inputs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the inputs."""
        return gradients_of(total, inputs, scale, every=self._every())

    def _weights_changed(self) -> None:
        """Let sharded models gather the weights anew, and autocast cast them anew."""
        if self.task.layout.shards is not None:
            self.task.layout.shards.reshard()
        torch.clear_autocast_cache()

    def _checked(self, result: StepResult) -> StepResult:
        """Return the result; skip or refuse it where it is not finite and the user wants that."""
        task = self.task
        if task.config.on_nonfinite == "propagate":
            return result
        if task.ranks.agree(all_finite(result.gradients), task.layout.tensors):
            return result
        if task.config.on_nonfinite == "raise":
            raise NonFiniteError(
                f"A loss or gradient of step {task.count} is not finite; weights and buffers are "
                "as before the call, and nothing was added to the gradients. "
                'Use on_nonfinite="skip" to leave such steps out.'
            )
        self._buffers.restore()
        report = StepReport(
            count=task.count,
            losses=result.report.losses,
            skipped=True,
            outputs=result.report.outputs,
        )
        return dataclasses.replace(result, gradients=[None] * len(result.gradients), report=report)

    def _base_report(self) -> StepReport:
        """Return what a step without a perturbation saw."""
        return StepReport(
            count=self.task.count, losses=self._values.detach(), outputs=self._outputs
        )

    def _report(
        self, before: Tensor, after: Tensor | None, selected: Selected | None, ascent: Ascent
    ) -> StepReport:
        """Return what the step saw."""
        return StepReport(
            count=self.task.count,
            losses=before,
            perturbed_losses=after,
            indices=None if selected is None else selected.indices,
            sample_weights=None if selected is None else selected.weights,
            perturbation_norm=ascent.perturbation_norm,
            gradient_norm=ascent.gradient_norm,
            perturbed=self.task.targets.names,
            weight_share=self.task.targets.weight_share,
            sample_share=1.0 if selected is None else len(selected.indices) / len(before),
            outputs=self._outputs,
        )
