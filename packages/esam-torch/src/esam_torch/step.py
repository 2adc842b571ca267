"""One step, pass by pass: mask, ascent, perturbation, selection, descent, restore.

Reads top to bottom as the table in the documentation does; each pass is one function. Whatever
fails or interrupts, weights, buffers, gradients and random state are as they were.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esam_core import ESAMConfig, ESAMValueError, Mask, NonFiniteError, StepReport, selectors
from esam_core.units import Unit
from esam_torch.ascent import ascent_gradients
from esam_torch.batch import Batch, Samples
from esam_torch.containers import detached
from esam_torch.devices import placed
from esam_torch.guards import Buffers, Gradients, RandomState, Weights, statistics_layers
from esam_torch.losses import LossFunction, per_sample
from esam_torch.notes import WITHOUT_A_GRAPH, noted, own_backward
from esam_torch.perturbation import Ascent, Direction, perturb
from esam_torch.prefix import Prefix
from esam_torch.selection import Selected, select
from esam_torch.sharded import Shards, local, local_part
from esam_torch.synchronisation import on_every_rank, unsynchronised
from esam_torch.units import Parameter

__all__ = ["Step"]


@dataclass
class Step:
    """Everything that one step works on. Made anew for each step; keeps nothing.

    Args:
        model: what `losses` calls.
        config: the hyperparameters.
        parameters: all units in the model's order, with their groups.
        mask: which of them this step perturbs, already restricted to those that can be.
        count: the number of this ascent.
        scaler: the gradient scaler of fp16 training, or None.
        prefix: the blocks that are not run twice, or None where nothing can be left out.
        shards: what FSDP2 has made of the model, or None where nothing is sharded.
        descend: what back-propagates the descent's loss, where a trainer does it in its own way,
            its scaling included; or None.
        samples: takes samples out of the batch.
        watch_rounding: whether to measure how much of the perturbation rounds away.
        stale: gradients that only an error before the last backward would bring back.

    Attributes:
        rounded: what was measured, a 0-d tensor, or None.
    """

    model: nn.Module
    config: ESAMConfig
    parameters: Sequence[Parameter]
    mask: Mask
    count: int
    scaler: Any = None
    prefix: Prefix | None = None
    shards: Shards | None = None
    descend: Callable[[Tensor], Any] | None = None
    samples: Samples = field(default_factory=Samples)
    watch_rounding: bool = False
    stale: list[Any] = field(default_factory=list)
    rounded: Tensor | None = field(default=None, init=False)
    _weights: Weights | None = field(default=None, init=False, repr=False)
    _written: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def run(
        self, losses: LossFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> StepReport:
        """Add the step's gradient to `.grad` and return its report."""
        self._weights_changed()  # by the base optimizer, since they were gathered
        trained = [p.tensor for p in self.parameters]
        random = RandomState(p.device for p in trained)
        buffers = Buffers(self.model)
        # Listed here: a forward puts gathered weights in the place of a sharded model's parameters.
        self._written = _differentiated(self.model, trained)
        gradients = Gradients(self._written)
        try:
            with torch.enable_grad():
                if any(self.mask.perturbed):
                    report = self._perturbed_step(losses, (args, dict(kwargs)), random)
                else:
                    report = self._base_step(losses, (args, dict(kwargs)))
            if self.config.on_nonfinite != "propagate" and not on_every_rank(
                _all_finite(trained), self.model, trained
            ):
                report = self._nonfinite(report)
                buffers.restore()
                gradients.restore()
            return report
        except BaseException:
            # An interrupt may have come while `_perturbed_step` was about to do this itself.
            if self.prefix is not None:
                self.prefix.unpatch()
            self._go_back()
            random.restore()
            buffers.restore()
            gradients.restore()
            raise

    def _nonfinite(self, report: StepReport) -> StepReport:
        """Raise, or return the report of a step that is skipped."""
        if self.config.on_nonfinite == "raise":
            raise NonFiniteError(
                f"A loss or gradient of step {self.count} is not finite; weights and buffers are "
                "as before the call, and nothing was added to the gradients. "
                'Use on_nonfinite="skip" to leave such steps out.'
            )
        return StepReport(
            count=report.count, losses=report.losses, skipped=True, outputs=report.outputs
        )

    # -- passes ---------------------------------------------------------------------------------

    def _base_step(self, losses: LossFunction, batch: Batch) -> StepReport:
        """Nothing is perturbed: forward and backward of the whole batch, and no more."""
        values, rest = self._forward(losses, self.samples.bare(batch))
        self._checked_size(batch, len(values))
        total = values.mean()
        if self.config.on_nonfinite != "propagate":  # what is looked for, is looked for in `.grad`
            total = _poisoned(total, torch.isfinite(values).all())
        self._backward(total)
        return StepReport(count=self.count, losses=values.detach(), outputs=rest)

    def _perturbed_step(self, losses: LossFunction, batch: Any, random: RandomState) -> StepReport:
        """Passes 2 to 6 of the step."""
        with unsynchronised(self.model):
            with self._recording():
                values, rest = self._forward(losses, self.samples.bare(batch))
            after_forward = RandomState(p.tensor.device for p in self.parameters)
            at_theta = Buffers(self.model)
            b = len(values)
            k = self._checked_size(batch, b)
            with self._recomputing():
                ascent = self._ascent(values)
        # A clone: where a compiled model replays CUDA graphs, the next pass writes over the losses.
        before = values.detach().clone()
        del values
        finite = ascent.finite
        self._weights = weights = Weights([self.parameters[t].tensor for t in self._perturbed])
        after: Tensor | None = None
        selected: Selected | None = None
        try:
            weights.add(ascent.perturbations)
            self._weights_changed()
            if self.watch_rounding:
                self.rounded = weights.rounded(ascent.perturbations)
            ascent.perturbations.clear()  # epsilon is in the weights; its memory is not needed
            if k < b:
                if self.config.select.score == "increase":
                    random.restore()
                    after = self._selection(losses, batch, b)
                    at_theta.restore()  # BatchNorm may be about to read its running statistics
                    finite = finite & torch.isfinite(after).all()
                selected = select(
                    self.config.select, before, after, seed=self.config.seed, count=self.count
                )
            random.restore()
            if self.prefix is not None and k < b:
                self.prefix.clear()
            self._descent(losses, batch, b, selected, finite)
        finally:
            self._go_back()
        at_theta.restore()
        after_forward.restore()
        return self._report(before, after, selected, ascent, rest)

    def _forward(
        self, losses: LossFunction, batch: Batch, expected: int | None = None
    ) -> tuple[Tensor, Any]:
        """Return (b,) losses with their graph, and what else the user's function returned."""
        args, kwargs = batch
        # Where the script holds autocast open around the step, casts of the weights are kept
        # between passes: of other weights, or of the same without a graph.
        torch.clear_autocast_cache()
        found, closure = losses(*args, **kwargs), not (args or kwargs)
        values, rest = per_sample(found, expected=expected, closure=closure)
        rest = detached(rest)  # or a kept report would keep the graph
        if torch.is_grad_enabled() and not values.requires_grad:
            raise ESAMValueError(
                "`losses` must depend on the model's parameters. Received: losses without a graph. "
                "Were they detached, computed under torch.no_grad(), or by a reentrant checkpoint "
                "(give it use_reentrant=False)?"
            )
        return values, rest

    def _ascent(self, values: Tensor) -> Ascent:
        """Return epsilon, from the gradient of the mean loss for the perturbed units."""
        adaptive = [
            self._of_group(p, "esam_adaptive", self.config.adaptive) for p in self.parameters
        ]
        perturbed = self._perturbed
        wanted = perturbed
        if self.config.norm == "full":
            # Of everything that is trained, whether it may be perturbed or not.
            trained = [t for t, p in enumerate(self.parameters) if p.tensor.requires_grad]
            wanted = perturbed + [t for t in trained if t not in set(perturbed)]
        tensors = [self.parameters[t].tensor for t in wanted]
        if self.shards is None:
            found = ascent_gradients(values.mean(), tensors, scaler=self.scaler)
        else:
            # Ranks share one epsilon, so all must see a loss that is not finite on one of them.
            loss = values.mean() * torch.where(torch.isfinite(values).all(), 1.0, torch.nan)
            found = self.shards.gradients(loss, tensors, self._written, scaler=self.scaler)
        chosen = found[: len(perturbed)]
        others = [
            (g, self.parameters[t].tensor, adaptive[t])
            for t, g in zip(wanted[len(perturbed) :], found[len(perturbed) :], strict=True)
        ]
        return perturb(
            chosen,
            [self.parameters[t].tensor for t in perturbed],
            [
                Direction(
                    self.mask.scale[t],
                    self._of_group(self.parameters[t], "esam_rho", self.config.rho),
                    adaptive[t],
                )
                for t in perturbed
            ],
            values.detach(),
            norm=self.config.norm,
            norm_eps=self.config.norm_eps,
            weight_masks=self._weight_masks([self.parameters[t].tensor for t in perturbed]),
            others=others,
        )

    def _selection(self, losses: LossFunction, batch: Batch, b: int) -> Tensor:
        """Return the (b,) losses at theta + epsilon; builds no graph."""
        with (
            torch.no_grad(),
            unsynchronised(self.model),
            self._replaying(),
            noted(WITHOUT_A_GRAPH, RuntimeError, "does not require grad"),
        ):
            values, _ = self._forward(losses, self.samples.bare(batch), expected=b)
        return values.clone()

    def _descent(
        self, losses: LossFunction, batch: Batch, b: int, selected: Selected | None, finite: Tensor
    ) -> None:
        """Add the gradient of the weighted losses of the selected samples at theta + epsilon."""
        if selected is None:
            with self._replaying():
                values, _ = self._forward(losses, self.samples.bare(batch), expected=b)
            total = values.mean()
        else:
            k = len(selected.indices)
            with _running_statistics(self.model, when=k == 1):
                part = self.samples.take(batch, selected.indices, b)
                with noted(self.samples.note(batch, k, b), Exception):
                    values, _ = self._forward(losses, part, expected=k)
                total = (selected.weights * values).sum()
        # What was not finite must be seen in `.grad`, even if the selected samples are harmless.
        self._backward(_poisoned(total, finite & torch.isfinite(total.detach())))

    def _recording(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the ascent's forward."""
        return contextlib.nullcontext() if self.prefix is None else self.prefix.recording()

    def _recomputing(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the ascent's backward."""
        return contextlib.nullcontext() if self.prefix is None else self.prefix.recomputing()

    def _replaying(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the one later forward on the whole batch."""
        return contextlib.nullcontext() if self.prefix is None else self.prefix.replaying()

    def _checked_size(self, batch: Batch, b: int) -> int:
        """Return k, the number of samples to select, of a batch that has b losses."""
        k = selectors.subset_size(self.config.select.gamma, b)
        if k < b:
            self.samples.check(batch, b)
        return k

    def _go_back(self) -> None:
        """Return to theta: phase 6."""
        if self._weights is not None:
            self._weights.restore()
            # An autocast region around the step would go on with casts of other weights.
            torch.clear_autocast_cache()
        self._weights_changed()

    def _weights_changed(self) -> None:
        """Let sharded models gather the weights anew."""
        if self.shards is not None:
            self.shards.reshard()

    def _backward(self, total: Tensor) -> None:
        """Back-propagate into `.grad`, scaled where the user scales."""
        self.stale.clear()
        if self.descend is None and self.scaler is not None:
            total = self.scaler.scale(total)
        with own_backward():
            (self.descend or Tensor.backward)(total)

    # -- what the passes need to know -------------------------------------------------------------

    @property
    def _perturbed(self) -> list[int]:
        """Places of the perturbed units."""
        return [t for t, m in enumerate(self.mask.perturbed) if m]

    @property
    def _perturbable(self) -> list[int]:
        """Places of the units that a mask may hit."""
        return [t for t, p in enumerate(self.parameters) if perturbable(p)]

    @staticmethod
    def _of_group(parameter: Parameter, key: str, default: Any) -> Any:
        """Return a parameter group's own value of an option, or the default."""
        return parameter.group.get(key, default)

    def _weight_masks(self, like: Sequence[Tensor]) -> list[Tensor] | None:
        """Draw the masks of single weights natively, from the seed that the host drew."""
        if self.mask.weight_beta is None or self.mask.weight_seed is None:
            return None
        generators: dict[torch.device, torch.Generator] = {}
        masks = []
        for tensor in like:
            device = tensor.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(self.mask.weight_seed)
            drawn = torch.rand(tensor.shape, generator=generators[device], device=device)
            masks.append(local_part(drawn < self.mask.weight_beta, tensor))
        return masks

    def _report(
        self,
        before: Tensor,
        after: Tensor | None,
        selected: Selected | None,
        ascent: Ascent,
        rest: Any,
    ) -> StepReport:
        """Return what the step saw."""
        b = len(before)
        units: list[Unit] = [p.unit for p in self.parameters]
        places = self._perturbed, self._perturbable
        perturbed, whole = (sum(units[t].size for t in s) for s in places)
        return StepReport(
            count=self.count,
            losses=before,
            perturbed_losses=after,
            indices=None if selected is None else selected.indices,
            sample_weights=None if selected is None else selected.weights,
            perturbation_norm=ascent.perturbation_norm,
            gradient_norm=ascent.gradient_norm,
            perturbed=tuple(units[t].name for t in self._perturbed),
            weight_share=perturbed / whole * (self.mask.weight_beta or 1.0),
            sample_share=1.0 if selected is None else len(selected.indices) / b,
            outputs=rest,
        )


def perturbable(parameter: Parameter) -> bool:
    """Say whether a mask may hit a parameter: it is trained, and its group allows it."""
    return parameter.tensor.requires_grad and parameter.group.get("esam_perturb", True)


def _differentiated(model: nn.Module, trained: Sequence[Tensor]) -> list[Tensor]:
    """Return every parameter whose `.grad` a backward may write to, the optimizer's or not."""
    others = [p for p in model.parameters() if p.requires_grad]
    return list({id(p): p for p in (*trained, *others)}.values())


def _poisoned(total: Tensor, finite: Tensor) -> Tensor:
    """Return the loss, or NaN, which no gradient survives, where something was not finite."""
    return total * torch.where(finite, 1.0, torch.nan)


def _all_finite(parameters: Sequence[Tensor]) -> bool:
    """Say whether every gradient is finite: the one synchronisation of "skip" and "raise"."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    values = [g._values() if g.is_sparse else g for g in gradients]
    values = [v for v in values if v.numel() > 0]
    if not values:
        return True
    largest = torch._foreach_norm(values, torch.inf)
    device = values[0].device
    return bool(torch.stack([placed(m.float(), device) for m in largest]).isfinite().all())


@contextlib.contextmanager
def _running_statistics(model: nn.Module, *, when: bool) -> Iterator[None]:
    """Let BatchNorm use its running statistics: one sample has none of its own."""
    layers = statistics_layers(model) if when else []
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True
