"""The model's parameters as the `Unit` records that samplers see."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from esam_core import ESAMTypeError, ESAMValueError, Unit
from esam_torch.sharded import reshard

if TYPE_CHECKING:
    from esam_torch.blocks import Blocks

__all__ = ["Parameter", "bare_model", "parameters_of"]


@dataclass(frozen=True)
class Parameter:
    """A parameter with its record and the parameter group that holds it."""

    tensor: Tensor
    unit: Unit
    group: dict[str, Any]


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = cast(nn.Module, model.module)
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def _kind(owner: nn.Module, leaf: str) -> str:
    """Say which of the four kinds a parameter called `leaf` of module `owner` is."""
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    return "bias" if "bias" in leaf else "weight"


def parameters_of(
    model: nn.Module, groups: list[dict[str, Any]], blocks: "Blocks | None" = None
) -> list[Parameter]:
    """Return the optimizer's parameters, in the model's order, with names and kinds.

    The model's order and not that of the groups: how a user sorts parameters into groups does
    not change which of them a mask hits.

    Args:
        model: what is trained; wrappers are looked through.
        groups: the base optimizer's parameter groups.
        blocks: the model's blocks, where they have been found.

    Raises:
        ESAMValueError: the optimizer holds a parameter that is not the model's.
    """
    if not isinstance(model, nn.Module):
        raise ESAMTypeError(
            "`model` must be a torch.nn.Module. Put tensors that are trained without one into "
            f"torch.nn.ParameterList([...]). Received: {type(model).__name__}."
        )
    group_of = {id(p): group for group in groups for p in group["params"]}
    found: list[Parameter] = []
    inner = bare_model(model)
    reshard(inner)  # what a forward of a sharded model has gathered are not its parameters
    for prefix, module in inner.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            group = group_of.pop(id(tensor), None)  # a tied parameter counts where it is first
            if group is not None:
                name = (f"{prefix}.{leaf}" if prefix else leaf).replace("_orig_mod.", "")
                place = 0 if blocks is None else blocks.block_of[id(tensor)]
                unit = Unit(
                    name,
                    tuple(tensor.shape),
                    _kind(module, leaf),
                    block="" if blocks is None else blocks.names[place],
                    cost=0.0 if blocks is None else blocks.cost_of[id(tensor)],
                    depth=place,
                    trained=tensor.requires_grad,
                )
                found.append(Parameter(tensor, unit, group))
    if group_of:
        strangers = [p for group in groups for p in group["params"] if id(p) in group_of]
        shapes = ", ".join(str(tuple(p.shape)) for p in strangers[:3])
        raise ESAMValueError(
            "The base optimizer must hold parameters of `model` only. Received: "
            f"{len(strangers)} that are not the model's, of shapes {shapes}. If the loss has "
            "parameters of its own (a temperature, a margin), give ESAM a container of both: "
            "torch.nn.ModuleList([model, loss]). If the parameters were replaced after the "
            "optimizer was made, by a `.to(...)` or a wrapper, make it anew."
        )
    return found
