"""The measured blocks of a model as data for checkpoints.

The costs of blocks are measured on one batch. Another one, with longer sentences or larger images,
can have other shares, and so another suffix: a resumed run must not measure again.
"""

from collections.abc import Sequence, Set
from typing import Any

from torch import nn

from esam_torch.blocks import Blocks, chosen_names
from esam_torch.compat import original_name
from esam_torch.wrappers import bare_model

__all__ = ["blocks_from", "blocks_to_data"]


def blocks_to_data(model: nn.Module, blocks: Blocks, trained: Set[int]) -> dict[str, Any]:
    """Return measured blocks as data.

    Args:
        model: the trained model.
        blocks: its blocks.
        trained: ids of the parameters that the optimizer trains.

    Returns:
        The names of the blocks; by the names of the parameters, their shapes, whether they are
        trained, the indices of their blocks and their costs; and whether the model asks which
        parameters have a gradient.
    """
    return {
        "names": list(blocks.names),
        "parameters": {
            name: [*key, blocks.block_of[place], blocks.cost_of.get(place, 0.0)]
            for name, place, key in _keys(model, trained)
        },
        "asks": blocks.asks,
    }


def blocks_from(
    data: dict[str, Any] | None,
    model: nn.Module,
    trained: Set[int],
    chosen: Sequence[nn.Module | str] | None,
) -> Blocks | None:
    """Return blocks from data; None if there are none, or not of this model.

    Args:
        data: from `blocks_to_data`, or None.
        model: the trained model.
        trained: ids of the parameters that the optimizer trains.
        chosen: the user's blocks, or None.
    """
    if data is None:
        return None
    if chosen is not None:
        names = chosen_names(chosen, dict(bare_model(model).named_modules()))
        if set(map(original_name, names)) != set(data["names"]):
            return None
    rows = data["parameters"]
    keys = _keys(model, trained)
    if {name: key for name, _, key in keys} != {name: row[:2] for name, row in rows.items()}:
        return None
    block_of = {place: rows[name][2] for name, place, _ in keys}
    cost_of = {place: rows[name][3] for name, place, _ in keys}
    return Blocks(tuple(data["names"]), block_of, cost_of, asks=data["asks"])


def _keys(model: nn.Module, trained: Set[int]) -> list[tuple[str, int, list[Any]]]:
    """Return the name of each parameter, its id, and its shape and whether it is trained."""
    return [
        (original_name(name), id(p), [list(p.shape), id(p) in trained])
        for name, p in bare_model(model).named_parameters()
    ]
