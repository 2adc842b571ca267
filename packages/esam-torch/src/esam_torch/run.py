"""A training run: all state that steps change, in one object.

Trainers copy an optimizer's attributes into their own wrappers; the copies share this object.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from esam_core import (
    ESAMConfig,
    ESAMRuntimeError,
    ESAMTypeError,
    Previous,
    StepReport,
)
from esam_core.budget import Plan
from esam_torch.batch import Batch, Samples, is_marked
from esam_torch.compat import (
    count_compiled_frames,
    parametrizations_are_cached,
    without_global_step_hooks,
)
from esam_torch.compiling import Compilation
from esam_torch.counting import SampleCounter
from esam_torch.directions import Climb, Memory, find_climb
from esam_torch.earlier import EarlierStep
from esam_torch.groups import check_groups
from esam_torch.guards import without_autocast
from esam_torch.inputs import call_apart
from esam_torch.inspection import Layout, lay_out, parameters_of, strange_leaves
from esam_torch.leaves import with_own_leaves
from esam_torch.losses import LossFunction, check_losses, per_sample
from esam_torch.notes import CLOSURE, LATE, PLAIN
from esam_torch.notices import Notices, recurrent_dropout_warning, rounding_warning
from esam_torch.seam import loss_with_backward
from esam_torch.spending import spend
from esam_torch.step import Step
from esam_torch.synchronisation import Ranks
from esam_torch.targets import Options, Targets
from esam_torch.task import StepResult, Task, nothing
from esam_torch.wrappers import refuse_cached

__all__ = ["Run"]


class Run:
    """A model, its base optimizer and hyperparameters, and the state of training.

    Args:
        base: the base optimizer.
        model: the model that `losses` calls.
        config: the hyperparameters.
        samples: selects samples from batches.
        blocks: the user's blocks, or None.
        budget: the maximum cost of a step, or None.

    Attributes:
        count: the number of steps so far.
        report: the report of the last step.
        pending: whether there are gradients of a backward without an update.
        skipped: whether a backward since the last update was skipped.
        spent: whether the budget has chosen the sampler and the selector in the configuration.
        plan: the plan for the budget; None before it is spent, and if a checkpoint has spent it.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        model: nn.Module,
        config: ESAMConfig,
        samples: Samples,
        *,
        blocks: Iterable[nn.Module | str] | None,
        budget: float | None,
    ) -> None:
        self.base = base
        self.config = config
        self.budget = budget
        self.spent = False
        self.plan: Plan | None = None
        self.count = 0
        self.report: StepReport | None = None
        self.pending = False
        self.skipped = False
        self.samples = samples
        self.memory = Memory()
        self.notices = Notices()
        self.counter = SampleCounter(samples, self.notices.add)
        self._blocks = None if blocks is None else list(blocks)
        self._losses_computed = 0
        self.measured: dict[str, Any] | None = None  # the blocks of steps, as data
        self._measured: dict[str, Any] | None = None  # those of a layout without a step
        self.set_model(model)

    def set_model(self, model: nn.Module) -> None:
        """Train this model, which may be a wrapper of the previous one."""
        parameters_of(model, self.base.param_groups)  # raises for parameters of another model
        self.model = model
        self.forget_layout()

    def forget_layout(self) -> None:
        """Inspect the model again in the next step."""
        self._layout: Layout | None = None
        self._ranks = Ranks(self.model)
        self._compilation = Compilation()

    def resume(
        self,
        config: ESAMConfig,
        count: int,
        budget: float | None,
        plan: Plan | None,
        memory: Memory,
        *,
        spent: bool,
        measured: dict[str, Any] | None,
    ) -> None:
        """Resume from a checkpoint."""
        self.config, self.count, self.memory = config, count, memory
        self.budget, self.spent, self.plan = budget, spent, plan
        self.measured = measured
        self.forget_layout()  # the sampler may be different
        self.pending = self.skipped = False

    # -- one step ---------------------------------------------------------------------------------

    def loss(self, losses: LossFunction, batch: Batch) -> Tensor:
        """Return the mean loss at theta, whose backward runs the rest of a step."""
        if torch.is_grad_enabled():
            return self._begun(losses, batch)[1]
        check_losses(losses, *batch)
        args, kwargs = self.samples.bare(batch)
        values, _ = per_sample(losses(*args, **kwargs))
        return values.mean()

    def _begun(
        self,
        losses: LossFunction,
        batch: Batch,
        before_descent: Callable[[], None] = nothing,
        *,
        whole: bool = False,
    ) -> tuple[Step, Tensor]:
        """Return a step after its first forward, and its loss; `whole`: only `backward` uses it."""
        self._losses_computed += 1
        check_losses(losses, *batch)
        check_groups(self.base.param_groups, self.base.defaults)
        if parametrizations_are_cached():
            refuse_cached(self.model)
        batch, leaves = with_own_leaves(batch, self.base.param_groups)
        task = self._task(losses, batch, before_descent)
        step = (Step if task.climb.direction is None else EarlierStep)(task, losses, batch)
        try:
            frames = count_compiled_frames()
            mean = step.ascend()
            self._compilation.look_at_pass(mean, frames)
            self._compilation.check(pruned=task.prunes)
            if task.layout.writes.late:
                self.notices.add("late", LATE)
            if step.batch_size == 1 and task.perturbs:
                self.counter.look_at_one_loss(self.config, batch)
            return step, self._seam(step, mean, leaves, whole=whole)
        except BaseException:
            step.undo()
            raise

    def _seam(self, step: Step, mean: Tensor, leaves: list[Any], *, whole: bool) -> Tensor:
        """Return the loss at theta with a backward that runs the rest of the step."""
        task, value = step.task, step.value
        plain = not (task.perturbs or leaves or whole)
        if (
            plain and self.config.on_nonfinite == "propagate"
        ):  # an ordinary step: the existing graph gives its gradient
            return loss_with_backward(value, [mean], lambda scale: self._base(step, scale))
        trained = task.layout.trained()
        inner = [leaf for _, leaf in leaves]
        strangers = strange_leaves(mean, inner, task.layout)
        inputs = [*trained, *strangers, *inner]
        outer = [*trained, *strangers, *(given for given, _ in leaves)]
        if not self._ranks.looks_for_unused:
            return loss_with_backward(value, outer, lambda scale: self._finish(step, scale, inputs))

        # The forward of the descent pass has marked its unused parameters for the ranks, and a
        # backward through this loss would reach these too.
        def gradients(scale: Tensor) -> list[Tensor | None]:
            found = self._finish(step, scale, inputs)
            used = [(p, g) for p, g in zip(trained, found, strict=False) if g is not None]
            if used:
                torch.autograd.backward([p for p, _ in used], [g for _, g in used])
            return [None, *found[len(trained) :]]

        reached = torch.zeros((), requires_grad=True)
        return loss_with_backward(value, [reached, *outer[len(trained) :]], gradients)

    def backward(
        self,
        losses: LossFunction,
        batch: Batch,
        before_descent: Callable[[], None] = nothing,
    ) -> StepReport:
        """Run a step's passes, add its gradient to `.grad` and return its report."""
        count = self.count
        with torch.enable_grad():
            step: Step | None = None
            try:
                step, loss = self._begun(losses, batch, before_descent, whole=True)
                with without_autocast(step.task.layout.devices):
                    torch.autograd.backward(loss)
            except BaseException:
                if step and self.count == count:  # an interrupt may come between the two halves
                    step.undo()
                raise
        return cast(StepReport, self.report)

    def step(self, losses: LossFunction, batch: Batch) -> StepReport:
        """Run a whole step with new gradients, and the base optimizer's update."""
        if self.pending:
            raise ESAMRuntimeError(
                "step(losses, ...) zeroes the gradients, but those of an earlier backward are "
                "pending. Call step() or zero_grad() first."
            )
        report = self.backward(losses, batch, before_descent=self.zero_grad)
        self.update(None)
        return report

    def update(self, closure: Callable[[], Any] | None) -> Any:
        """Run the base optimizer's update with the existing gradients.

        Args:
            closure: None, or a function that runs the backward itself, as for torch's optimizers.
        """
        result, computed = None, 0
        if closure is not None:
            check_losses(closure)
            before = self._losses_computed
            with torch.enable_grad():
                result = closure()
            computed = self._losses_computed - before
            if not computed and result is not None:
                raise ESAMTypeError(CLOSURE)
        # Lightning's weight averaging runs closures that compute a loss without a backward.
        plain = not (computed or self.pending or self.skipped)
        creates_state = plain and self._moves_nothing()
        if plain and not creates_state:
            self.notices.add("plain", PLAIN)
        skipped, self.skipped = self.skipped and not self.pending, False
        self.pending = False
        kept = isinstance(self.config.ascend, Previous) and not (skipped or creates_state)
        if kept and self._layout is not None:
            self.memory.record_update(self._layout, self.config)
        with without_global_step_hooks():
            updated = None if skipped else self.base.step()
        return updated if closure is None else result

    def _moves_nothing(self) -> bool:
        """Return whether all learning rates are 0, as when torch's checkpoints create state."""
        return all(float(group.get("lr", 1.0)) == 0.0 for group in self.base.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.pending = self.skipped = False
        self.base.zero_grad(set_to_none)

    def _base(self, step: Step, scale: Tensor) -> list[Tensor]:
        """Record a base step, whose backward continues through the loss."""
        self._note(step.finish_base())
        return [scale]

    def _finish(self, step: Step, scale: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
        """Run the rest of a step, record it, and return its gradients."""
        try:
            result = step.finish(scale, inputs)
            self._note(result)
        except BaseException:
            step.undo()
            raise
        return list(result.gradients)

    def _note(self, result: StepResult) -> None:
        """Record a step."""
        self.report = result.report
        self.measured, self._measured = self._measured or self.measured, None
        self.pending = self.pending or not result.report.skipped
        self.skipped = self.skipped or result.report.skipped
        if result.rounded is not None:
            self.notices.add("rounding", rounding_warning(float(result.rounded)))
        if result.compared:
            self.notices.add("agreement", result.disagreement)
        self.count += 1

    def _task(self, losses: LossFunction, batch: Any, before_descent: Callable[[], None]) -> Task:
        """Return the task of the next step."""
        layout = self.layout(losses, batch)
        config = self.config
        mask = config.perturb.draw(layout.units, seed=config.seed, count=self.count)
        options = Options.of(config)
        targets = layout.targets(mask, options)
        size = functools.partial(self.counter.count, self.model, layout, losses, batch)
        climb = find_climb(
            config, targets, self.memory, self.base, layout, count=self.count, size=size
        )
        if climb is None:  # there is no ascent direction yet
            mask = mask.within([False] * len(mask.perturbed))
            climb, targets = Climb(), layout.targets(mask, options)
        return Task(
            model=self.model,
            config=config,
            layout=layout,
            ranks=self._ranks,
            samples=self.samples.of(losses, batch),
            mask=mask,
            targets=targets,
            count=self.count,
            prunes=climb.direction is None and self._prunes(losses, layout, targets),
            watch_rounding="rounding" not in self.notices and targets.any_half,
            compare="agreement" not in self.notices
            and bool(targets.tensors)
            and config.uses_subsets
            and not is_marked(batch),
            before_descent=before_descent,
            climb=climb,
        )

    def _prunes(self, losses: LossFunction, layout: Layout, targets: Targets) -> bool:
        """Return whether the ascent pass builds its graph only for the perturbed weights."""
        if not (targets.tensors and targets.idle):
            return False
        if self.config.norm == "full" or layout.shards is not None:  # all gradients are needed
            return False
        why = layout.why_all_gradients()
        if why is not None:
            self.notices.add(why, why)
            return False
        prunes = self._compilation.prunes(losses, self.config.perturb, layout.units)
        if isinstance(prunes, str):
            self.notices.add("compiled", prunes)
        return prunes is True

    # -- the layout and the budget ----------------------------------------------------------------

    def layout(self, losses: LossFunction, batch: Any) -> Layout:
        """Return the layout of the model; apply the budget when it is new.

        It is created again if the model's modules or the optimizer's parameters change.
        """
        if self._layout is None or not self._layout.holds(self.model, self.base.param_groups):
            unspent = self.budget is not None and not self.spent
            layout = self.lay_out(losses, batch, watch=unspent)
            self._compilation.look_at(self.model)
            if unspent:
                self.plan = spend(cast(float, self.budget), layout, self.model, self.config)
                chosen = self.plan.chosen
                self.config = dataclasses.replace(
                    self.config, perturb=chosen.perturb, select=chosen.select
                )
                self.spent = True
                if self.plan.warning is not None:
                    self.notices.add("reach", self.plan.warning)
            if (short := layout.reach_warning(self.config)) is not None:
                self.notices.add("reach", short)
            self._layout, self._measured = layout, layout.measured
        return self._layout

    def lay_out(self, losses: LossFunction, batch: Any, *, watch: bool) -> Layout:
        """Return the layout of the current model."""
        args, kwargs = batch
        check_losses(losses, args, kwargs)

        def forward() -> Any:
            return call_apart(losses, self.samples.bare(batch))

        layout = lay_out(
            self.model,
            self.base.param_groups,
            self.config.perturb,
            forward,
            chosen=self._blocks,
            watch=watch,
            measured=None if watch else self.measured,
        )
        if layout.blocks is not None and layout.blocks.warning is not None:
            self.notices.add("early", layout.blocks.warning)
        if (noisy := recurrent_dropout_warning(self.model)) is not None:
            self.notices.add("recurrent", noisy)
        return layout

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy: the layout is found again for the copy.
        return {**self.__dict__, "_layout": None, "_ranks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget_layout()
