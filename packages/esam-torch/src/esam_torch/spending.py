"""Choosing what to perturb and select, from a budget and a measured model."""

from typing import Any

from torch import nn

from esam_core import ESAMConfig, ESAMValueError, validation
from esam_core.budget import Plan, make_plan
from esam_torch.inspection import Layout, Parameter, parameters_of
from esam_torch.targets import Options

__all__ = ["CHOSEN", "all_parameters", "check_budget", "spend"]

#: The hyperparameters that a budget chooses.
CHOSEN = ("perturb", "select")


def all_parameters(layout: Layout, model: nn.Module) -> list[Parameter]:
    """Return all parameters of a model: those outside the optimizer also add to the cost."""
    return parameters_of(model, [{"params": list(model.parameters())}], layout.blocks)


def spend(budget: float, layout: Layout, model: nn.Module, config: ESAMConfig) -> Plan:
    """Return a plan for a budget, based on measured costs.

    Args:
        budget: the most that a step may cost, in base steps.
        layout: the model's layout, with blocks and costs.
        model: the trained model.
        config: the hyperparameters.
    """
    defaults = Options.of(config)
    reached = {id(p.tensor) for p in layout.parameters if defaults.of_group(p.group).perturbs}
    every = all_parameters(layout, model)
    return make_plan(
        [p.unit for p in every],
        budget,
        norm=config.norm,
        perturbable=[id(p.tensor) in reached for p in every],
        ascend=config.ascend,
    )


def check_budget(budget: float | None, **instead: Any) -> float | None:
    """Return the budget, after checking that nothing else sets what it chooses."""
    if budget is None:
        return None
    given = {name: value for name, value in instead.items() if value is not None}
    if given:
        listed = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ESAMValueError(
            "`budget` chooses the sampler and the selector: pass either `budget` or these. "
            f"Received: budget={budget!r}, {listed}."
        )
    return validation.positive("budget", budget)
