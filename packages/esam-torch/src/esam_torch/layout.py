"""The parameters and the blocks of the model at hand, found once and kept from step to step."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from esam_core import Sampler
from esam_torch.blocks import Blocks, find_blocks
from esam_torch.guards import Buffers, RandomState
from esam_torch.notes import WITHOUT_A_GRAPH, noted
from esam_torch.synchronisation import unsynchronised
from esam_torch.units import Parameter, parameters_of

__all__ = ["Layout", "lay_out"]


@dataclass(frozen=True)
class Layout:
    """What is known of a model.

    Args:
        groups: the parameter groups, each with the parameters that it held.
        blocks: the model's blocks, or None if no use is made of them.
        parameters: all units in the model's order.
    """

    groups: Sequence[tuple[dict[str, Any], tuple[Any, ...]]]
    blocks: Blocks | None
    parameters: list[Parameter]

    def holds(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Say whether these are still the same groups with the same parameters."""
        return len(groups) == len(self.groups) and all(
            group is then
            and len(group["params"]) == len(old)
            and all(map(operator.is_, group["params"], old))
            for group, (then, old) in zip(groups, self.groups, strict=True)
        )


def lay_out(
    model: nn.Module,
    groups: list[dict[str, Any]],
    sampler: Sampler,
    forward: Callable[[], Any],
    *,
    chosen: Sequence[nn.Module | str] | None,
    watch: bool,
) -> Layout:
    """Return the parameters, with their blocks and costs where these are of use.

    Args:
        model: what is trained.
        groups: the base optimizer's parameter groups.
        sampler: what will draw the masks.
        forward: runs the model once on a batch; called only to find blocks.
        chosen: the user's blocks, or None.
        watch: find the blocks even if the sampler has no use for them.
    """
    parameters = parameters_of(model, groups)
    held = [(group, tuple(group["params"])) for group in groups]
    if not (watch or chosen is not None or _uses_blocks(sampler, parameters)):
        return Layout(held, None, parameters)
    # One more forward without a graph, which leaves nothing behind.
    random = RandomState(p.tensor.device for p in parameters)
    buffers = Buffers(model)
    try:
        with (
            unsynchronised(model),
            noted(WITHOUT_A_GRAPH, RuntimeError, "does not require grad"),
        ):
            blocks = find_blocks(model, forward, chosen)
    finally:
        buffers.restore()
        random.restore()
    return Layout(held, blocks, parameters_of(model, groups, blocks))


def _uses_blocks(sampler: Sampler, parameters: list[Parameter]) -> bool:
    """Say whether to look for blocks: it costs one forward, once."""
    if sampler.needs_blocks:
        return True
    masks = sampler.masks([p.unit for p in parameters])
    # A mask that is always the same and leaves out the first unit leaves a prefix untouched.
    return masks is not None and any(m.active and not m.perturbed[0] for m in masks)
