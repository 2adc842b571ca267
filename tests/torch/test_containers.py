"""Containers that contain themselves."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from esam_torch import ESAM, Whole
from esam_torch.containers import INSIDE, map_values, tensors_inside


@dataclasses.dataclass(eq=False)
class Node:
    """A node of a tree that refers to its parent."""

    name: str
    parent: "Node | None" = None
    children: list = dataclasses.field(default_factory=list)


def test_a_marked_value_that_contains_itself():
    loop = [1, 2]
    loop.append(loop)
    model = nn.Linear(4, 3)
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, gamma=0.5)

    def losses(x, y, found):
        assert found[2] is found
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    x, y = torch.randn(6, 4), torch.arange(6) % 3
    optimizer.step(losses, x, y, Whole(loop))


@pytest.mark.parametrize("visit", [map_values, tensors_inside], ids=["map", "tensors"])
def test_a_tree_whose_nodes_know_their_parents_is_visited_once(visit):
    """Not along every path of 50 nodes, whose number is exponential."""
    root = Node("root")
    root.children = [Node(str(i), root) for i in range(3)]
    if visit is map_values:
        names = []

        def note(value, _):
            if isinstance(value, str):
                names.append(value)
                assert len(names) < 20
            return INSIDE

        assert map_values(root, note, strict=False) is root
        assert set(names) == {"root", "0", "1", "2"}
    else:
        root.children[1].children = [torch.ones(1)]
        assert len(list(itertools.islice(tensors_inside(root), 9))) == 1
