"""The optimizer that people use."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import torch
from torch import nn

from esam_core import (
    ESAMConfig,
    ESAMRuntimeError,
    ESAMTypeError,
    ESAMValueError,
    Everything,
    Mask,
    Sampler,
    Selector,
    StepReport,
    Unit,
    validation,
)
from esam_core.budget import Plan, make_plan
from esam_core.config import component_to_dict
from esam_torch.bases import check_base, refuse_a_class_in_second_place
from esam_torch.batch import Batch, Samples
from esam_torch.blocks import Blocks, compiled_as_a_whole
from esam_torch.groups import check_groups
from esam_torch.guards import is_half
from esam_torch.layout import Layout, lay_out
from esam_torch.losses import LossFunction
from esam_torch.prefix import Prefix
from esam_torch.sharded import Shards
from esam_torch.step import Step, perturbable
from esam_torch.units import Parameter, parameters_of

__all__ = ["ESAM"]


class ESAM(torch.optim.Optimizer):
    """Efficient sharpness-aware minimisation around any optimizer.

    Args:
        base_optimizer: an optimizer over parameters of `model`, such as
            `torch.optim.SGD(model.parameters(), lr=0.1)`. Any whose `step` needs no closure.
        model: the module that `losses` calls; with DistributedDataParallel, that object.
        rho: radius of the perturbation, finite, >= 0. Default 0.05. 0 is the base optimizer.
        beta: share of the parameter tensors that is perturbed in each step, in (0, 1]; short for
            `perturb=Bernoulli(beta)`. Default 0.6.
        gamma: share of the samples in the descent pass, in (0, 1]; short for
            `select=TopIncrease(gamma)`. Default 0.5.
        perturb: a mask sampler in place of `beta`, such as `Suffix("layer3")`.
        select: a data selector in place of `gamma`, such as `TopLoss(0.5)`.
        adaptive: scale the perturbation with the weights (ASAM). Default False.
        norm: "masked" (default), "estimated", "full" or "none": which norm the ascent gradient is
            divided by.
        norm_eps: added to that norm, finite, > 0. Default 1e-12.
        seed: of masks and random selections, in [0, 2**63). Default 0.
        on_nonfinite: "propagate" (default), "skip" or "raise".
        scaler: the `torch.amp.GradScaler` of fp16 training. Default None.
        blocks: the model's blocks in execution order, as modules or their names, for samplers that
            cut the model. Default: found by watching one forward.
        budget: the most that a step may cost on average, in steps of the base optimizer (SAM costs
            2), > 0, in place of `beta`, `gamma`, `perturb` and `select`: the first `backward`
            measures the model's blocks and chooses. `plan()` shows the choice. Default None.
        take: the function take(batch, indices) that takes samples out of a batch, where the rules
            for samples (see the documentation) do not fit; `batch` is the tuple of arguments of
            `losses`, and it returns the tuple for those samples. Default None.

    Raises:
        ESAMValueError, ESAMTypeError: naming the argument, what must hold, and what came.

    Differences from the paper: masks are drawn for the step at hand, from (seed, count) alone;
    k = ceil(gamma b) samples are kept, with ties to the lower index; see the documentation.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from esam_torch import ESAM
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)
        >>> def losses(inputs, targets):
        ...     return F.cross_entropy(model(inputs), targets, reduction="none")
        >>> inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
        >>> report = optimizer.step(losses, inputs, targets)
        >>> report.losses.shape, report.sample_share
        (torch.Size([8]), 0.5)

    Source: Du et al., ICLR 2022 (arXiv 2110.03141), algorithm 1.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse the arguments of other implementations before Python refuses their keywords."""
        first, second = (*args, None, None)[:2]
        refuse_a_class_in_second_place(first, second, options)
        return super().__new__(cls)

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        rho: float = 0.05,
        beta: float | None = None,
        gamma: float | None = None,
        perturb: Sampler | None = None,
        select: Selector | None = None,
        adaptive: bool = False,
        norm: str = "masked",
        norm_eps: float = 1e-12,
        seed: int = 0,
        on_nonfinite: str = "propagate",
        scaler: Any = None,
        blocks: Iterable[nn.Module | str] | None = None,
        budget: float | None = None,
        take: Callable[..., Any] | None = None,
    ) -> None:
        if isinstance(base_optimizer, ESAM):
            raise ESAMTypeError("`base_optimizer` must not be another ESAM.")
        check_base(base_optimizer)
        self._config = ESAMConfig.from_arguments(
            rho=rho,
            beta=beta,
            gamma=gamma,
            perturb=perturb,
            select=select,
            adaptive=adaptive,
            norm=norm,
            norm_eps=norm_eps,
            seed=seed,
            on_nonfinite=on_nonfinite,
        )
        self._budget = _check_budget(budget, beta=beta, gamma=gamma, perturb=perturb, select=select)
        self._plan: Plan | None = None
        self._samples = Samples(take)
        check_groups(base_optimizer.param_groups)
        parameters_of(model, base_optimizer.param_groups)  # refuses parameters of another model
        self._base = base_optimizer
        self._model = model
        self._scaler = _check_scaler(scaler, on_nonfinite)
        self._blocks = None if blocks is None else list(blocks)
        self._count = 0
        self._laid_out: Layout | None = None
        self._reuses = True  # the prefix, where a step has one
        self._pending = False
        # What `step(losses, ...)` has zeroed: let go of when the new gradients come.
        self._stale: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        # Set by integrations: how a trainer back-propagates, and whether the closures that it
        # hands to `step` call `backward`, so that the update is all that is left to do.
        self._descend: Callable[[torch.Tensor], Any] | None = None
        self._closures_go_backward = False
        self._warned_plain = False
        self._warned_compiled = False
        self._warned_rounding = False
        # torch's way to make an optimizer without parameter groups of its own: the groups and the
        # state are the base's (see the properties), hooks and the profiler's wrapper are ours.
        self.__setstate__({"defaults": dict(base_optimizer.defaults)})

    # -- the base optimizer's, at all times -------------------------------------------------------

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that makes the update."""
        return self._base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups: the very list."""
        return self._base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self._base.state

    @state.setter
    def state(self, state: Any) -> None:
        self._base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its parameters must be the model's."""
        check_groups([param_group])
        self._base.add_param_group(param_group)
        try:
            parameters_of(self._model, self._base.param_groups)
        except ESAMValueError:
            self._base.param_groups.pop()
            raise

    def train(self) -> None:
        """Call the base optimizer's `train()` where it has one (schedule-free optimizers)."""
        if hasattr(self._base, "train"):
            self._base.train()

    def eval(self) -> None:
        """Call the base optimizer's `eval()` where it has one (schedule-free optimizers)."""
        if hasattr(self._base, "eval"):
            self._base.eval()

    # -- the step ---------------------------------------------------------------------------------

    @property
    def config(self) -> ESAMConfig:
        """The hyperparameters."""
        return self._config

    @property
    def model(self) -> nn.Module:
        """The model that `losses` calls. May be set to what wraps it (DistributedDataParallel)."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        parameters_of(model, self._base.param_groups)  # refuses another model
        self._model = model
        self._laid_out = None

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16 training, or None."""
        return self._scaler

    @scaler.setter
    def scaler(self, scaler: Any) -> None:
        self._scaler = _check_scaler(scaler, self._config.on_nonfinite)

    @property
    def count(self) -> int:
        """How many `backward` calls there have been: what masks and schedules are drawn from."""
        return self._count

    def backward(self, losses: LossFunction, *batch: Any, **kwargs: Any) -> StepReport:
        """Add ESAM's gradient to `.grad`: what stands where `loss.backward()` stood.

        The weights are bit for bit what they were when this returns or raises.

        Args:
            losses: a function of the batch that calls the model and returns one loss a sample, a
                floating tensor of shape (b,), or a tuple of that and anything else, which comes
                back as `report.outputs`.
            *batch: its arguments: tensors, arrays and lists with one entry per sample, tuples,
                mappings and dataclasses of them, and anything else. The descent pass gets the
                entries of the selected samples; `Rows(x)` and `Whole(x)` say what is one, where
                that is not certain.
            **kwargs: its keyword arguments, likewise.

        Returns:
            A `StepReport`. Nothing in it has waited for the device.

        Raises:
            ESAMValueError, ESAMTypeError: `losses` did not return one floating loss a sample.
            NonFiniteError: `on_nonfinite="raise"`, and a loss or gradient was not finite.
        """
        _check_losses(losses)
        check_groups(self._base.param_groups)
        shards = Shards.of(self._model)
        layout = self._layout(losses, batch, kwargs)
        blocks, parameters = layout.blocks, layout.parameters
        mask = self._mask(parameters)
        step = Step(
            model=self._model,
            config=self._config,
            parameters=parameters,
            mask=mask,
            count=self._count,
            scaler=self._scaler,
            # Sharded weights get their gradients from a whole backward.
            prefix=None if shards is not None else self._prefix(losses, blocks, parameters, mask),
            shards=shards,
            descend=self._descend,
            samples=self._samples,
            watch_rounding=self._watches_rounding(parameters, mask),
            stale=self._stale,
        )
        report = self._run(step, losses, batch, kwargs)
        if step.prefix is not None and step.prefix.traced:
            # A compiled function somewhere within `losses` calls the model: blocks patched once
            # more would have it compiled anew in each step.
            self._reuses = False
            self._warn_of_compiled()
        self._count += 1
        self._pending = True
        if step.rounded is not None:
            self._warn_of_rounding(float(step.rounded))
        return report

    def _run(
        self, step: Step, losses: LossFunction, batch: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepReport:
        """Run a step; without the reuse of the prefix where the script's own code needs it whole.

        A penalty on the gradient of a hidden activation, say, asks for the graph that was left
        out. All is as before the step then, so the same step can be made the literal way.
        """
        try:
            return step.run(losses, batch, kwargs)
        except (RuntimeError, ESAMValueError) as error:
            if step.prefix is None or isinstance(error, torch.OutOfMemoryError | ESAMRuntimeError):
                raise
            literally = dataclasses.replace(step, prefix=None)
            report = literally.run(losses, batch, kwargs)
            step.rounded = literally.rounded
            self._reuses = False
            warnings.warn(
                "From now on every pass runs the whole model: `losses` failed where the blocks "
                "before the first perturbed one ran without a graph, or were not run again, and "
                f"did not fail without that. It was: {type(error).__name__}: {error}",
                stacklevel=3,
            )
            return report

    def _watches_rounding(self, parameters: list[Parameter], mask: Mask) -> bool:
        """Say whether to measure, once, how much of the perturbation half precision swallows."""
        if self._warned_rounding or not mask.active:
            return False
        rows = zip(parameters, mask.perturbed, strict=True)
        return any(m and is_half(p.tensor) for p, m in rows)

    def _warn_of_rounding(self, share: float) -> None:
        """Say once that perturbations were smaller than the spacing of the weights' numbers."""
        self._warned_rounding = True
        if share > 0.0:
            warnings.warn(
                f"{share:.1%} of the entries of the first perturbation rounded away: weights in "
                "half precision cannot move by so little. Keep the weights in float32 and use "
                "torch.autocast, or take a larger rho.",
                stacklevel=3,
            )

    def step(self, closure: LossFunction | None = None, *batch: Any, **kwargs: Any) -> Any:
        """Make the base optimizer's update; with `losses` and a batch, the whole step.

        Args:
            closure: None (default): update with the gradients that `backward` has left. Or
                `losses`, as in `backward`: gradients are zeroed, computed and used.
            *batch: arguments of `losses`.
            **kwargs: keyword arguments of `losses`.

        Returns:
            What the base optimizer's `step` returns; the `StepReport` where `losses` is given.

        Raises:
            ESAMRuntimeError: `losses` is given while gradients of a `backward` wait for a step.
        """
        if self._closures_go_backward and closure is not None:
            result = closure()
            self._pending = False
            self._base.step()
            return result
        if closure is None:
            if batch or kwargs:
                raise ESAMTypeError("step() with a batch needs `losses` as its first argument.")
            if not self._pending and not self._warned_plain:
                self._warned_plain = True
                warnings.warn(
                    "step() without a backward(losses, ...) since the last one: this update is the "
                    "base optimizer's own, without any sharpness in it.",
                    stacklevel=2,
                )
            self._pending = False
            return self._base.step()
        if self._pending:
            raise ESAMRuntimeError(
                "step(losses, ...) zeroes the gradients, and those of a backward(losses, ...) "
                "still wait for a step(). Call step() or zero_grad() first."
            )
        if self._scaler is not None:
            raise ESAMRuntimeError(
                "With `scaler`, call backward(losses, ...), then scaler.step(optimizer) and "
                "scaler.update(): only the scaler knows whether the update may be made."
            )
        _check_losses(closure)
        tensors = [p for group in self._base.param_groups for p in group["params"]]
        self._stale = [(p, p.grad) for p in tensors if p.grad is not None]
        self.zero_grad()
        try:
            report = self.backward(closure, *batch, **kwargs)
        except BaseException:
            for parameter, gradient in self._stale:
                parameter.grad = gradient
            raise
        finally:
            self._stale = []
        self._pending = False
        if not report.skipped:
            self._base.step()
        return report

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self._pending = False
        self._base.zero_grad(set_to_none)

    def _mask(self, parameters: list[Parameter]) -> Mask:
        """Return the mask of the coming step, without the units that may not be perturbed."""
        units = [p.unit for p in parameters]
        config = self._config
        mask = config.perturb.draw(units, seed=config.seed, count=self._count)
        return mask.within(map(self._may_perturb, parameters))

    def _may_perturb(self, parameter: Parameter) -> bool:
        """Say whether a mask may hit a parameter."""
        return perturbable(parameter) and parameter.group.get("esam_rho", self._config.rho) > 0.0

    # -- what need not be run ---------------------------------------------------------------------

    def _layout(
        self, losses: LossFunction, batch: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Layout:
        """Return parameters and blocks, kept from step to step; spend the budget when they are new.

        Made anew when the optimizer's groups hold other parameters.
        """
        if self._laid_out is None or not self._laid_out.holds(self._base.param_groups):
            unspent = self._budget is not None and self._plan is None
            self._laid_out = self._lay_out(losses, batch, kwargs, watch=unspent)
            # DataParallel's copies of a block would run the block that they were copied from.
            self._reuses = not any(isinstance(m, nn.DataParallel) for m in self._model.modules())
            if unspent:
                self._spend_budget(self._laid_out)
        return self._laid_out

    def _lay_out(
        self,
        losses: LossFunction,
        batch: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        watch: bool,
    ) -> Layout:
        """Return parameters and blocks as they are now."""
        return lay_out(
            self._model,
            self._base.param_groups,
            self._config.perturb,
            lambda: _called(losses, self._samples.bare((batch, kwargs))),
            chosen=self._blocks,
            watch=watch,
        )

    def _spend_budget(self, layout: Layout) -> None:
        """Choose sampler and selector for the budget, from the costs just measured."""
        mine = {id(p.tensor): p for p in layout.parameters}
        every = self._every_parameter(layout)
        plan = make_plan(
            [p.unit for p in every],
            cast(float, self._budget),
            norm=self._config.norm,
            perturbable=[
                id(p.tensor) in mine and self._may_perturb(mine[id(p.tensor)]) for p in every
            ],
        )
        self._config = dataclasses.replace(
            self._config, perturb=plan.chosen.perturb, select=plan.chosen.select
        )
        self._plan = plan

    def _every_parameter(self, layout: Layout) -> list[Parameter]:
        """Return all parameters of the model: what the optimizer does not hold costs as well."""
        groups = [{"params": list(self._model.parameters())}]
        return parameters_of(self._model, groups, layout.blocks)

    def measured_units(self, losses: LossFunction, *batch: Any, **kwargs: Any) -> tuple[Unit, ...]:
        """Return the model's units with their blocks and costs, for `esam_core.cost`.

        Args:
            losses: as in `backward`; called once, without a graph. Nothing is changed by it.
            *batch: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            One `Unit` a parameter tensor of the model, in its order, those included that the
            optimizer does not hold; costs are the floating-point operations of a forward on this
            batch.
        """
        layout = self._lay_out(losses, batch, kwargs, watch=True)
        return tuple(p.unit for p in self._every_parameter(layout))

    def plan(self, losses: LossFunction | None = None, *batch: Any, **kwargs: Any) -> Plan:
        """Print and return what `budget` buys on this model: a table of options and the choice.

        Args:
            losses: None after the first `backward`; before it, what `backward` will be given.
            *batch: arguments of `losses`; it is called once, without a graph.
            **kwargs: keyword arguments of `losses`.

        Raises:
            ESAMRuntimeError: there is no budget, or the model has not been measured yet.
        """
        if losses is not None:
            self._layout(losses, batch, kwargs)
        if self._plan is None:
            raise ESAMRuntimeError(
                "plan() needs `budget` and a measured model: make ESAM(..., budget=1.15), and call "
                "plan(losses, *batch) or, after the first backward, plan(). A checkpoint in which "
                f"the budget has been spent brings its choice instead: {self._config.perturb!r}, "
                f"{self._config.select!r}."
            )
        print(self._plan)  # noqa: T201  # this is what it is for
        return self._plan

    def _prefix(
        self,
        losses: LossFunction,
        blocks: Blocks | None,
        parameters: list[Parameter],
        mask: Mask,
    ) -> Prefix | None:
        """Return the prefix that this step need not run twice, or None."""
        if blocks is None or not mask.active or not self._reuses:
            return None
        # The full norm takes gradients through the prefix, and uses its graph up.
        full = self._config.norm == "full"
        everything = self._config.select.gamma == 1.0
        keep = not full if everything else self._config.select.score == "increase"
        if full and not keep:
            return None
        prefix = Prefix(
            blocks,
            {id(p.tensor) for p, m in zip(parameters, mask.perturbed, strict=True) if m},
            sorted({p.tensor.device for p in parameters}, key=str),
            graph=full or everything,
            keep=keep,
        )
        if not prefix.worthwhile:
            return None
        if compiled_as_a_whole(self._model, blocks, losses):
            self._warn_of_compiled()
            return None
        return prefix

    def _warn_of_compiled(self) -> None:
        """Say once that no block can be left out of what is compiled in one piece."""
        if not self._warned_compiled:
            self._warned_compiled = True
            warnings.warn(
                "The model or `losses` is compiled as a whole, so the blocks before the first "
                "perturbed one cannot be left out, and its backward computes every weight "
                "gradient. Compile the blocks instead: for block in (model.layer1, "
                "model.layer2, ...): block.compile().",
                stacklevel=5,
            )

    # -- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict and one more entry, "esam".

        It loads into the bare base optimizer too. Hooks registered on either optimizer run; torch
        does not keep the entry in a `torch.distributed.checkpoint`: see `DistributedState`.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._base.state_dict()
        # A budget that has been spent is in the configuration, as its sampler and selector.
        budget = self._budget if self._plan is None else None
        state["esam"] = {
            "count": self._count,
            "config": self._config.to_dict(),
            "budget": budget,
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or a bare base optimizer's.

        Hyperparameters, seed and count come from the checkpoint, as the learning rate does. A
        sampler that holds a function cannot be saved, and stays the one given in code.
        """
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else dict(changed)
        own = state.pop("esam", None)
        config, count, budget, plan = self._config, self._count, self._budget, self._plan
        if own is not None:  # all that can be refused comes first
            config, count = _loaded(own["config"], config), int(own["count"])
            budget, plan = own.get("budget"), None
            _check_scaler(self._scaler, config.on_nonfinite)
        self._base.load_state_dict(state)
        self._config, self._count, self._budget, self._plan = config, count, budget, plan
        self._laid_out = None  # the sampler may be another one
        self._pending = False
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy, which copies the model and the base optimizer along with this one. A
        # scheduler's wrapper around `step` belongs to the original.
        state = self.__dict__.copy()
        state.pop("step", None)
        state["_laid_out"] = None
        return state

    def __repr__(self) -> str:
        config = self._config
        return (
            f"ESAM({type(self._base).__name__}, rho={config.rho}, perturb={config.perturb!r}, "
            f"select={config.select!r}, norm={config.norm!r}, count={self._count})"
        )


def _loaded(saved: dict[str, Any], given: ESAMConfig) -> ESAMConfig:
    """Return a saved configuration; a sampler that could not be saved is the one given."""
    if saved["perturb"] is not None:
        return ESAMConfig.from_dict(saved)
    stand_in = {**saved, "perturb": component_to_dict(Everything())}
    return dataclasses.replace(ESAMConfig.from_dict(stand_in), perturb=given.perturb)


def _check_budget(budget: float | None, **instead: Any) -> float | None:
    """Return the budget, if nothing else says what it should decide."""
    if budget is None:
        return None
    given = {name: value for name, value in instead.items() if value is not None}
    if given:
        listed = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ESAMValueError(
            "`budget` chooses the sampler and the selector: give it, or them. "
            f"Received: budget={budget!r}, {listed}."
        )
    return validation.positive("budget", budget)


def _called(losses: LossFunction, batch: Batch) -> Any:
    """Return what `losses` returns for a batch."""
    args, kwargs = batch
    return losses(*args, **kwargs)


def _check_losses(losses: Any) -> None:
    """Refuse what cannot be called, a tensor of losses above all."""
    if not callable(losses):
        raise ESAMTypeError(
            "`losses` must be a function of the batch that returns one loss a sample, so that it "
            f"can be evaluated again at other weights. Received: {type(losses).__name__}."
        )


def _check_scaler(scaler: Any, on_nonfinite: str) -> Any:
    """Return the scaler if it can do its work."""
    if scaler is None:
        return None
    if not (
        callable(getattr(scaler, "scale", None)) and callable(getattr(scaler, "unscale_", None))
    ):
        raise ESAMTypeError(
            f"`scaler` must be a torch.amp.GradScaler. Received: {type(scaler).__name__}."
        )
    if on_nonfinite != "propagate":
        raise ESAMValueError(
            '`on_nonfinite` must be "propagate" beside `scaler`, which finds overflows in `.grad` '
            f"and skips the update itself. Received: on_nonfinite={on_nonfinite!r}."
        )
    return scaler
