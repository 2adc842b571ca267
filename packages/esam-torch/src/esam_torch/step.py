"""One step, pass by pass: ascent, perturbation, selection, descent, restore.

The order is that of the table in the documentation; each pass is one method. The forward of the
ascent pass is a separate method (`ascend`), because the user's script computes the loss first and
calls its backward later, which runs the rest (`finish`). After any error or interrupt, weights,
buffers and random state are restored.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from esam_core import ESAMValueError, Momentum, Previous, StepReport
from esam_core.selectors import subset_size
from esam_torch.agreement import compare_losses
from esam_torch.ascent import dense_shards, gradients_of
from esam_torch.attention import without_graphs
from esam_torch.batch import Batch
from esam_torch.between import Between
from esam_torch.containers import detach_tree
from esam_torch.devices import on_device
from esam_torch.dropout import NoiselessEvaluation
from esam_torch.finiteness import all_finite, flaw_in, nan_if_flawed, not_finite
from esam_torch.forwards import Forward
from esam_torch.guards import Evaluation, Pruning, RandomState, Weights
from esam_torch.inspection import find_leaves
from esam_torch.losses import LossFunction, per_sample
from esam_torch.notes import PRUNED, WITHOUT_A_GRAPH, WITHOUT_PARAMETERS, note_errors
from esam_torch.perturbation import Ascent
from esam_torch.selection import Selected
from esam_torch.task import StepResult, Task, report_of
from esam_torch.written import Kept

__all__ = ["Step"]


class Step:
    """One step on one batch.

    Args:
        task: the inputs of the step.
        losses: the user's function.
        batch: its arguments and keyword arguments.
    """

    def __init__(self, task: Task, losses: LossFunction, batch: Batch) -> None:
        self.task = task
        self._batch = task.samples.own(batch)
        self._between = Between(task, losses, task.samples.bare(self._batch))
        self._weights: Weights | None = None
        self._comparison: tuple[str | None, bool] = None, False
        self._without_noise = NoiselessEvaluation()
        self._single = Evaluation()
        self._values: Tensor
        self._mean: Tensor
        self._outputs: Any
        self._after_part: RandomState
        self._written: Kept
        self._expected = task.climb.batch_size
        self._reached: set[int] = set()
        self._pruning = Pruning()

    # -- the two halves ---------------------------------------------------------------------------

    def ascend(self) -> Tensor:
        """Run the forward of the ascent pass and return the mean loss at theta, with its graph."""
        layout, ranks = self.task.layout, self.task.ranks
        if layout.shards is not None:
            layout.shards.check_reducing()
            layout.shards.reshard()  # the base optimizer has changed the weights since
        self._random = RandomState(layout.devices)
        self._first = Forward(layout.writes)
        self._losses = self._between.read_only(watched=self._first.watched)
        self._synchronised = ranks.synchronised
        ranks.note_forward()
        self._mean = self._first_pass()
        self._between.note(watched=self._first.watched)
        return self._mean

    @property
    def value(self) -> Tensor:
        """The mean loss at theta, without its graph."""
        return self._mean.detach()

    @property
    def batch_size(self) -> int:
        """The number of samples in the batch, after the first pass."""
        return len(self._values) if self._expected is None else self._expected

    def finish(self, scale: Tensor, inputs: Sequence[Tensor]) -> StepResult:
        """Run the rest of the step, and return its gradient.

        Args:
            scale: 0-d, the gradient of what is minimised with respect to the mean loss.
            inputs: the tensors to compute gradients for.
        """
        self._between.check()
        with torch.enable_grad(), self._between.restoring():
            run = self._perturbed_step if self.task.perturbs else self._base_step
            return self._check(run(scale, inputs))

    def finish_base(self) -> StepResult:
        """Return the result of a base step whose gradient is computed by the script's backward."""
        self.task.before_descent()
        return StepResult((), self._base_report())

    def undo(self) -> None:
        """Restore everything that the step may have changed."""
        if not hasattr(self, "_synchronised"):
            return  # the copies are incomplete, but nothing has been changed
        self._pruning.end()
        self._without_noise.end()
        self._single.end()
        if self._weights is not None:
            self._weights.restore()
            self._refresh_weights()
        self._random.restore()
        self._first.undo()

    # -- passes -----------------------------------------------------------------------------------

    def _first_pass(self) -> Tensor:
        """Return the mean loss at theta of the samples in the ascent pass, with its graph."""
        task = self.task
        if task.climb.part is not None:
            task.samples.check(self._batch, self.batch_size)
        with self._climbing():
            if task.climb.part is None:
                whole = not task.prunes
                self._values, self._outputs = self._forward_all(self._expected, whole=whole)
            else:
                self._values, self._outputs = self._forward_of(task.climb.part)
                self._after_part = RandomState(task.layout.devices)
        self._first.note()
        if task.perturbs and not task.records_at_theta:
            self._first.undo()  # keep what the descent pass writes
        self._expected = self.batch_size
        # A base step instead of one with an earlier direction. The latter needs the samples before
        # its first pass; here they are known anyway.
        first = isinstance(task.config.ascend, Previous | Momentum)
        checks = task.climb.part is None and (task.perturbs or first)
        if checks and self._selected < self.batch_size:
            task.samples.check(self._batch, self.batch_size)
        return self._values.mean()

    def _forward_of(self, indices: Tensor) -> tuple[Tensor, Any]:
        """Run `_forward` on some samples of the batch.

        A single sample of a larger batch has no batch statistics: BatchNorm then uses the running
        statistics.
        """
        samples, k, b = self.task.samples, len(indices), self.batch_size
        with contextlib.ExitStack() as stack:
            if k == 1:
                stack.enter_context(self._single.inside(self.task.statistics_layers))
            with torch.enable_grad():  # rows of an input that requires a gradient require one too
                part = samples.take(self._batch, indices, b)
            note = functools.partial(samples.note, self._batch, k, b)
            stack.enter_context(note_errors(note, Exception))
            return self._forward(part, k)

    def _base_step(self, scale: Tensor, inputs: Sequence[Tensor]) -> StepResult:
        """Run only the backward of the first pass: nothing is perturbed."""
        self.task.before_descent()
        total = nan_if_flawed(self._mean, flaw_in(self._values))
        return StepResult(self._gradients(total, scale, inputs), self._base_report())

    def _perturbed_step(self, scale: Tensor, inputs: Sequence[Tensor]) -> StepResult:
        """Passes 2 to 6 of the step."""
        task, random = self.task, RandomState(self.task.layout.devices)
        self._written = task.layout.writes.keep()  # after the pass at theta
        others_drew = not task.records_at_theta and self._after_part.has_moved()
        b, k = self.batch_size, self._selected
        with self._climbing():
            ascent = self._ascent(scale, inputs)
        # A clone: if a compiled model replays CUDA graphs, the next pass overwrites the losses.
        before = self._values.detach().clone()
        del self._values, self._mean
        self._compare(b)
        flaw = ascent.flaw
        if task.scores_the_rest(b):
            self._random.restore()
            before = self._score_all(before, task.climb.part)
            flaw = flaw + flaw_in(before)
        self._written.trained.restore()  # the last forward may have been on other samples
        after: Tensor | None = None
        selected: Selected | None = None
        rounded: Tensor | None = None
        with self._at_the_peak(ascent) as weights:
            if task.watch_rounding:
                rounded = weights.share_rounded_away(ascent.perturbations)
            ascent.perturbations.clear()  # epsilon is in the weights; its memory is not needed
            if task.scores_perturbed(b):
                self._random.restore()
                after = self._without_a_graph(b)
                flaw = flaw + flaw_in(after)
            if k < b:
                selected = task.select(b, before, after)
            self._random.restore()
            gradients = self._descent(selected, flaw, scale, inputs)
            self._written.restore()  # before the weights, which a forward may write too
        if task.records_at_theta or others_drew:
            random.restore()
        report = report_of(task, b, self._outputs, before, after, selected, ascent)
        return StepResult(gradients, report, rounded, *self._comparison)

    def _ascent(self, scale: Tensor, inputs: Sequence[Tensor]) -> Ascent:
        """Return epsilon, from the gradient of the mean loss for the perturbed units."""
        task, targets = self.task, self.task.targets
        # With "full", all trained ones; some layers are reached only on the way to others.
        full = task.config.norm == "full"
        idle = targets.idle if full or task.layout.writes.accumulates else ()
        wanted = [*targets.tensors, *idle]
        loss = self._mean
        if task.layout.shards is not None:
            # Ranks share one epsilon, so a non-finite loss on one rank must affect all.
            loss = nan_if_flawed(loss, flaw_in(self._values))
        found = dense_shards(self._backward(loss, wanted, scale, inputs), wanted, loss)
        if not full:
            del found[len(targets.tensors) :]
        return task.epsilon(found, self._values.detach(), scale)

    @contextlib.contextmanager
    def _at_the_peak(self, ascent: Ascent) -> Iterator[Weights]:
        """Move the weights to theta + epsilon inside the context."""
        self._weights = weights = Weights(self.task.targets)
        try:
            weights.add(ascent.perturbations)
            self._refresh_weights()
            yield weights
        finally:
            weights.restore()
            self._refresh_weights()
            self._weights = None  # the copies are not needed any more

    def _score_all(self, losses: Tensor, part: Tensor | None) -> Tensor:
        """Return the (b,) losses at theta, after a forward of the samples outside the part."""
        b = self.batch_size
        if part is None:  # there are none, but the other ranks wait for this one
            self._without_a_graph(b)
            return losses
        rest = part.new_ones(b, dtype=torch.bool).index_fill_(0, part, False).nonzero().flatten()
        places = on_device(torch.cat([part, rest]).argsort(), losses.device)
        return torch.cat([losses, self._without_a_graph(b, rest)]).index_select(0, places)

    def _without_a_graph(self, b: int, indices: Tensor | None = None) -> Tensor:
        """Return the losses of the batch, or of some samples, at the current weights."""
        self._first.rewind()
        without = note_errors(WITHOUT_A_GRAPH, RuntimeError, "does not require grad")
        with without_graphs(), self.task.ranks.apart(), without:
            found = self._forward_all(b) if indices is None else self._forward_of(indices)
            values = found[0].clone()
        self._first.note()
        return values

    def _compare(self, b: int) -> None:
        """Find, once per run, whether a sample's loss depends on the other samples."""
        if not self.task.compares(b):
            return
        batch = self._batch

        def losses_of(batch: Batch, indices: Tensor | None) -> Tensor:
            self._batch = batch
            return self._without_a_graph(b, indices)

        try:
            found = compare_losses(self.task, self._without_noise, batch, b, losses_of)
            self._comparison = found, True
        finally:
            self._batch = batch

    def _descent(
        self, selected: Selected | None, flaw: Tensor, scale: Tensor, inputs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the gradient of the weighted losses of the selected samples at theta + epsilon."""
        alone = contextlib.nullcontext() if self._synchronised else self.task.ranks.apart()
        with alone:
            total = self._descent_loss(selected)[0]
            if self.task.records_at_theta:  # otherwise the user sees only what this pass has kept
                self.task.layout.writes.find_graphs()
            else:
                self._written = self.task.layout.writes.keep()  # checkpointed parts write again
        self.task.before_descent()
        # Non-finite values must reach the gradient, even if all selected samples are finite.
        return self._gradients(nan_if_flawed(total, flaw), scale, inputs)

    def _descent_loss(self, selected: Selected | None) -> tuple[Tensor, Tensor, Any]:
        """Return the weighted loss of the selected samples, their losses, and other outputs."""
        self._first.rewind()
        # On one sample BatchNorm uses its running statistics, as the pass at theta has left them.
        if not self.task.records_at_theta or (selected and len(selected.indices) == 1):
            self._written.statistics.restore()
        if selected is None:
            values, outputs = self._forward_all(self._expected, whole=True)
            return values.mean(), values, outputs
        values, outputs = self._forward_of(selected.indices)
        if not values.requires_grad:
            # A constant loss for images without objects, say: 0 for what the other samples use.
            self._reached = find_leaves(self._first_losses, self.task.model, self.task.layout)
        weights = on_device(selected.weights, values.device).to(values.dtype)
        return (weights * values).sum(), values, outputs

    def _first_losses(self) -> Tensor:
        """Return the losses of the whole batch with their graph, as in a first pass."""
        self._first.rewind()
        return self._forward_all(self.batch_size, whole=True)[0]

    def _forward_all(self, expected: int | None, *, whole: bool = False) -> tuple[Tensor, Any]:
        """Run `_forward` on the whole batch."""
        return self._forward(self.task.samples.bare(self._batch), expected, whole=whole)

    def _forward(
        self, batch: Batch, expected: int | None, *, whole: bool = False
    ) -> tuple[Tensor, Any]:
        """Return (b,) losses with their graph, and the other outputs of the user's function.

        Args:
            batch: arguments of `losses`.
            expected: the number of losses, if it is known.
            whole: whether these are all samples, with the gradients of all parameters. Other losses
                may depend on none of the parameters in question, and then have no graph.
        """
        args, kwargs = batch
        # An autocast context around the step caches casts: of other weights, or without a graph.
        torch.clear_autocast_cache()
        shards, closure = self.task.layout.shards, not (args or kwargs)
        with contextlib.nullcontext() if shards is None else shards.resharding():
            found = self._between.call(self._losses, args, kwargs)
        values, outputs = per_sample(found, expected=expected, closure=closure)
        outputs = detach_tree(outputs)  # otherwise a kept report would keep the graph
        if whole and torch.is_grad_enabled() and not values.requires_grad:
            raise ESAMValueError(WITHOUT_PARAMETERS)
        return values, outputs

    # -- what the passes need ---------------------------------------------------------------------

    @functools.cached_property
    def _selected(self) -> int:
        """The number of samples in the descent pass."""
        return subset_size(self.task.config.select.gamma, self.batch_size)

    @contextlib.contextmanager
    def _climbing(self) -> Iterator[None]:
        """Compute gradients only of perturbed weights, only on this rank, inside the context."""
        with contextlib.ExitStack() as stack:
            if self.task.perturbs:
                stack.enter_context(self.task.ranks.apart())
            if self.task.prunes:
                stack.enter_context(note_errors(PRUNED, RuntimeError, "does not require grad"))
                stack.enter_context(self._pruning.inside(self.task.targets.idle))
            yield

    def _gradients(
        self, total: Tensor, scale: Tensor, inputs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the inputs."""
        if not total.requires_grad and self.task.layout.shards is None:
            return [torch.zeros_like(x) if id(x) in self._reached else None for x in inputs]
        return self._backward(total, inputs, scale, inputs)

    def _backward(
        self, loss: Tensor, tensors: Sequence[Tensor], scale: Tensor, inputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients of some tensors; note if a layer adds some to `.grad` itself."""
        layout = self.task.layout
        found, own = gradients_of(
            loss,
            tensors,
            scale,
            every=None if layout.shards is None else inputs,
            accumulates=self._first.watched or layout.writes.accumulates,
        )
        layout.writes.accumulates |= own
        return found

    def _refresh_weights(self) -> None:
        """Let sharded models gather the weights again, and autocast cast them again."""
        if self.task.layout.shards is not None:
            self.task.layout.shards.reshard()
        torch.clear_autocast_cache()

    def _check(self, result: StepResult) -> StepResult:
        """Return the result; skip it or raise if it is not finite, depending on `on_nonfinite`."""
        task = self.task
        if task.config.on_nonfinite == "propagate" or task.ranks.agree(
            all_finite(result.gradients), task.layout.everything
        ):
            return result
        if task.config.on_nonfinite == "raise":
            raise not_finite(task.count)
        self._first.undo(generators=False)
        return result.skipped()

    def _base_report(self) -> StepReport:
        """Return the report of a step with one pass."""
        return report_of(self.task, self.batch_size, self._outputs, self._values.detach())
