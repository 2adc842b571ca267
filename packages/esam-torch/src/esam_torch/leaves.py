"""Tensors of the batch that require a gradient, which passes replace by leaves."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from esam_core import ESAMRuntimeError
from esam_torch.ascent import graph_leaves
from esam_torch.containers import INSIDE, map_values
from esam_torch.marks import Mark

__all__ = ["with_own_leaves"]


def with_own_leaves(
    batch: Any, groups: Iterable[Mapping[str, Any]]
) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Replace tensors that require a gradient by leaves; return the batch and the pairs.

    Every pass differentiates with respect to the leaf. The step passes the gradient of the descent
    pass on to the given tensor.

    Args:
        batch: any nested containers.
        groups: the base optimizer's parameter groups.

    Raises:
        ESAMRuntimeError: a tensor is a trained parameter, or was computed from some.
    """
    args, kwargs = batch
    if not kwargs and all(type(x) is Tensor and not x.requires_grad for x in args):
        return batch, []
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def replace(x: Any, _: str) -> Any:
        if isinstance(x, Mark):
            value = map_values(x.value, replace, strict=False)
            return x if value is x.value else type(x)(value)
        if not isinstance(x, Tensor):
            return INSIDE
        if not x.requires_grad:
            return x
        if id(x) not in found:
            leaf = x.detach().requires_grad_()
            found[id(x)] = x, nn.Parameter(leaf) if isinstance(x, nn.Parameter) else leaf
        return found[id(x)][1]

    replaced = map_values(batch, replace, strict=False)
    if not found:
        return batch, []
    trained = {id(p) for group in groups for p in group["params"]}
    for given, _ in found.values():
        if id(given) in trained:
            raise ESAMRuntimeError(
                "`losses` must take trained parameters from the model, and not from its arguments: "
                "a step evaluates it at other weights. Received: a parameter of shape "
                f"{tuple(given.shape)} in the batch. Use it inside `losses`."
            )
        if any(id(leaf) in trained for leaf in graph_leaves(given)):
            raise ESAMRuntimeError(
                "`losses` must compute everything that depends on trained parameters, because a "
                "step evaluates it again at other weights. Received: a tensor of shape "
                f"{tuple(given.shape)} in the batch that was computed from them. Compute it inside "
                "`losses`, or detach it."
            )

    return replaced, list(found.values())
