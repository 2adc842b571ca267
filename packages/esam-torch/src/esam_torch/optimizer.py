"""The optimizer `ESAM`."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from esam_core import (
    Batch,
    Direction,
    ESAMConfig,
    ESAMRuntimeError,
    ESAMTypeError,
    Momentum,
    Sampler,
    Selector,
    StepReport,
    Unit,
)
from esam_core.budget import Plan
from esam_core.config import OnNonfinite
from esam_core.perturbation import Norm
from esam_torch.bases import check_base, refuse_optimizer_class
from esam_torch.batch import Samples
from esam_torch.compat import call_untraced
from esam_torch.delegation import DelegatingOptimizer
from esam_torch.directions import check_moment
from esam_torch.groups import check_groups
from esam_torch.losses import LossFunction
from esam_torch.run import Run
from esam_torch.spending import all_parameters, check_budget

__all__ = ["ESAM"]


class ESAM(DelegatingOptimizer):
    """Efficient sharpness-aware minimisation around any optimizer.

    The defaults are the paper's method; `beta=1.0, gamma=1.0` is SAM. The most accurate setting in
    our study, which is small, was `perturb=Suffix(0.5), gamma=1.0, ascend=Part(0.25)`.

    Args:
        base_optimizer: an optimizer of parameters of `model`, such as
            `torch.optim.SGD(model.parameters(), lr=0.1)`. Any optimizer whose `step` needs no
            closure.
        model: the module that `losses` calls; with DistributedDataParallel, that object.
        rho: the perturbation radius, finite, >= 0. Default 0.05. With 0, steps are base steps.
        beta: share of the parameter tensors to perturb, in (0, 1]; short for
            `perturb=Bernoulli(beta)`. Default 0.6.
        gamma: share of the samples in the descent pass (the second gradient), in (0, 1]; short for
            `select=TopIncrease(gamma)`. Default 0.5.
        perturb: which weights to perturb: a sampler such as `Suffix(0.5)`, instead of `beta`.
        select: which samples the second gradient uses: a selector such as `Proportional(0.5)`,
            instead of `gamma`.
        adaptive: scale the perturbation by the weights (ASAM). Default False.
        norm: the norm that divides the ascent gradient. "masked" (default): that of the gradients
            of the perturbed tensors, as in the authors' code. "estimated": an estimate of the whole
            gradient's norm from them. "full": the norm of the whole gradient, which needs a whole
            backward pass. "none": no division, as in the paper's algorithm 1.
        norm_eps: added to that norm, finite, > 0. Default 1e-12.
        ascend: the ascent direction: the gradient of the batch (`Batch()`, default) or of a part of
            it (`Part(share)`); or, without an ascent pass, the gradient of the previous update
            (`Previous()`) or the base optimizer's first moment (`Momentum()`).
        seed: of masks and random selections, in [0, 2**63). Default 0.
        on_nonfinite: what to do if a loss or gradient is not finite: "propagate" (default; it
            reaches `.grad`), "skip" (the step adds nothing) or "raise" (`NonFiniteError`).
        blocks: the model's blocks in order of execution, as modules or names, for samplers that use
            blocks. Default: found by watching one forward pass.
        budget: the most that a step may cost, in base steps (SAM costs 2), > 0, instead of `beta`,
            `gamma`, `perturb` and `select`: the first step measures the blocks and chooses;
            `plan()` returns the choice. Default None.
        take: a function take(batch, indices) that returns the tuple of arguments of `losses` for
            the selected samples, if the built-in rules do not fit. Default None.

    Raises:
        ESAMValueError, ESAMTypeError: an argument is invalid; the message names it, the requirement
            and the value received.

    Unlike in the paper, masks depend only on (seed, count); among samples with equal scores, the
    one with the lower index is selected.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from esam_torch import ESAM
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)
        >>> def losses(inputs, targets):
        ...     return F.cross_entropy(model(inputs), targets, reduction="none")
        >>> optimizer.loss(losses, torch.randn(8, 4), torch.randint(3, (8,))).backward()
        >>> optimizer.step()
        >>> optimizer.report.losses.shape, optimizer.report.sample_share
        (torch.Size([8]), 0.5)

    Source: Du et al., ICLR 2022 (arXiv 2110.03141), algorithm 1.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Raise for arguments of other SAM implementations before Python rejects keywords."""
        first, second = (*args, None, None)[:2]
        refuse_optimizer_class(first, second, options)
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
        norm: Norm = "masked",
        norm_eps: float = 1e-12,
        ascend: Direction | None = None,
        seed: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        blocks: Iterable[nn.Module | str] | None = None,
        budget: float | None = None,
        take: Callable[..., Any] | None = None,
    ) -> None:
        if isinstance(base_optimizer, ESAM):
            raise ESAMTypeError("`base_optimizer` must not be another ESAM.")
        check_base(base_optimizer)
        config = ESAMConfig.from_arguments(
            rho=rho,
            beta=beta,
            gamma=gamma,
            perturb=perturb,
            select=select,
            adaptive=adaptive,
            norm=norm,
            norm_eps=norm_eps,
            ascend=Batch() if ascend is None else ascend,
            seed=seed,
            on_nonfinite=on_nonfinite,
        )
        budget = check_budget(budget, beta=beta, gamma=gamma, perturb=perturb, select=select)
        if isinstance(config.ascend, Momentum):
            check_moment(base_optimizer)
        check_groups(base_optimizer.param_groups, base_optimizer.defaults)
        samples = Samples(take)
        super().__init__(Run(base_optimizer, model, config, samples, blocks=blocks, budget=budget))

    # -- the step ---------------------------------------------------------------------------------

    def loss(self, losses: LossFunction, *batch: Any, **kwargs: Any) -> Tensor:
        """Return the mean loss of a batch; its `backward()` adds ESAM's gradient to `.grad`.

        It is an ordinary differentiable tensor: scale it, divide it for accumulation, add other
        losses to it. Computing it runs the forward pass of the ascent; its `backward()` runs the
        rest of the step (Du et al. 2022, algorithm 1). The weights are then bit for bit what they
        were, and `report` describes the step. If `backward()` is never called, or gradients are
        disabled, this is an ordinary forward pass. If you compute several losses before the first
        `backward()`, they all use the same mask.

        Args:
            losses: a function of the batch that calls the model and returns one loss per sample,
                floating and of shape (b,), or a tuple of these losses and other outputs, which are
                returned as `report.outputs`.
            *batch: its arguments, with one entry per sample: tensors, arrays, lists, and containers
                of them. The descent pass (the second gradient) gets the entries of the selected
                samples. Use `Rows(x)` and `Whole(x)` if it is ambiguous which values have such
                entries.
            **kwargs: its keyword arguments, handled in the same way.

        Returns:
            The mean loss of the first pass, of shape (): with `ascend=Part(...)`, of the part.

        Raises:
            ESAMValueError, ESAMTypeError: `losses` did not return one floating loss per sample.
            ESAMRuntimeError: in `backward()`, if it is called a second time.
            NonFiniteError: in `backward()`, if a value is not finite and `on_nonfinite="raise"`.

        Example:
            >>> import torch
            >>> from torch.nn import functional as F
            >>> from esam_torch import ESAM
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
            >>> def losses(inputs, targets):
            ...     return F.cross_entropy(model(inputs), targets, reduction="none")
            >>> loss = optimizer.loss(losses, torch.randn(8, 4), torch.randint(3, (8,)))
            >>> (loss + 1e-4 * model.weight.square().sum()).backward()
            >>> optimizer.step()
        """
        loss: Tensor = call_untraced(self._run.loss, losses, (batch, kwargs))
        self._warn("loss")
        return loss

    def backward(self, losses: LossFunction, *batch: Any, **kwargs: Any) -> StepReport:
        """Add ESAM's gradient to `.grad`, as `loss(...).backward()` does; return the report.

        Args:
            losses: as in `loss`.
            *batch: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ESAMValueError, ESAMTypeError: `losses` did not return one floating loss per sample.
            NonFiniteError: a value is not finite and `on_nonfinite="raise"`.

        Example:
            >>> import torch
            >>> from esam_torch import ESAM
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
            >>> def losses(inputs):
            ...     return model(inputs).square().flatten()
            >>> optimizer.zero_grad()
            >>> optimizer.backward(losses, torch.randn(8, 4)).losses.shape
            torch.Size([8])
            >>> optimizer.step()
        """
        report: StepReport = call_untraced(self._run.backward, losses, (batch, kwargs))
        self._warn("backward")
        return report

    def step(self, closure: LossFunction | None = None, *batch: Any, **kwargs: Any) -> Any:
        """Run the base optimizer's update or, with `losses` and a batch, the whole step.

        Args:
            closure: None (default): update with the gradients that `backward()` computed. With a
                batch: `losses`, as in `loss`. Without a batch: a function that calls `backward()`
                itself.
            *batch: arguments of `losses`.
            **kwargs: keyword arguments of `losses`.

        Returns:
            The result of the base optimizer's `step`, or the `StepReport` if `losses` is given.

        Raises:
            ESAMRuntimeError: `losses` is given, but gradients of an earlier `backward()` are
                pending.

        Example:
            >>> import torch
            >>> from esam_torch import ESAM
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
            >>> def losses(inputs):
            ...     return model(inputs).square().flatten()
            >>> optimizer.loss(losses, torch.randn(8, 4)).backward()
            >>> optimizer.step()
            >>> optimizer.step(losses, torch.randn(8, 4)).count  # a whole step: the second one
            1
        """
        run = self._run
        if closure is None and (batch or kwargs):
            raise ESAMTypeError("step() with a batch needs `losses` as its first argument.")
        if not (batch or kwargs):
            result = call_untraced(run.update, closure)
        else:
            result = call_untraced(run.step, closure, (batch, kwargs))
        self._warn("step")
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self._run.zero_grad(set_to_none)

    # -- what is known ----------------------------------------------------------------------------

    def measured_units(self, losses: LossFunction, *batch: Any, **kwargs: Any) -> tuple[Unit, ...]:
        """Return the model's units with their blocks and costs, for `esam_core.cost`.

        Args:
            losses: as in `loss`; called once, without gradients or side effects.
            *batch: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            One `Unit` per parameter tensor of the model, in its order, also for those that are not
            in the optimizer. Costs are the FLOPs of a forward pass on this batch.

        Example:
            >>> import torch
            >>> from esam_torch import ESAM
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
            >>> optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
            >>> def losses(inputs):
            ...     return model(inputs).square().flatten()
            >>> units = optimizer.measured_units(losses, torch.randn(8, 4))
            >>> [(unit.name, unit.block, unit.cost) for unit in units if unit.kind == "weight"]
            [('0.weight', '0', 256.0), ('1.weight', '1', 64.0)]
        """
        layout = self._run.lay_out(losses, (batch, kwargs), watch=True)
        self._warn("measured_units")
        return tuple(p.unit for p in all_parameters(layout, self.model))

    def plan(self, losses: LossFunction | None = None, *batch: Any, **kwargs: Any) -> Plan:
        """Return the options within `budget` for this model, and the choice; its `str` is a table.

        Args:
            losses: as in `loss`; may be None after the first step.
            *batch: arguments of `losses`, which is called once, without gradients.
            **kwargs: keyword arguments of `losses`.

        Raises:
            ESAMRuntimeError: there is no budget, or the model has not been measured yet.

        Example:
            >>> import torch
            >>> from esam_torch import ESAM, Part
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
            >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = ESAM(base, model, budget=1.3, ascend=Part(0.25))
            >>> def losses(inputs):
            ...     return model(inputs).square().flatten()
            >>> plan = optimizer.plan(losses, torch.randn(8, 4))
            >>> plan.chosen.ratio, plan.chosen.perturb
            (1.25, Everything())
        """
        if losses is not None:
            self._run.layout(losses, (batch, kwargs))
            self._warn("plan")
        if self._run.plan is None:
            choice = f"{self.config.perturb!r}, {self.config.select!r}"
            raise ESAMRuntimeError(
                "plan() needs `budget` and a measured model: create ESAM(..., budget=1.2), and "
                "call plan(losses, *batch) or, after the first step, plan()."
                + (f" A checkpoint has applied the budget: {choice}." if self._run.spent else "")
            )
        return self._run.plan

    def __repr__(self) -> str:
        base = type(self._run.base).__name__
        return f"ESAM({base}, {self.config.summary()}, count={self.count})"


# So that `help` and editors show the arguments of `__init__`, and not those of `__new__`.
ESAM.__new__.__signature__ = inspect.signature(ESAM.__init__)  # type: ignore[attr-defined]
