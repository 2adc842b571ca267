"""Terms of the loss that a forward pass keeps in an attribute, and that are added outside."""

import pytest
import torch
from tests.torch.scene import sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Suffix


class Keeping(nn.Module):
    """A network whose forward keeps a term that shares its features."""

    def __init__(self):
        super().__init__()
        self.trunk, self.middle = nn.Linear(4, 8), nn.Linear(8, 8)
        self.aux, self.head = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x):
        features = torch.tanh(self.middle(torch.tanh(self.trunk(x))))
        self.term = self.aux(features).square().mean()
        return self.head(features)


@pytest.mark.filterwarnings("ignore:The model keeps tensors")
@pytest.mark.parametrize(
    "options",
    [{"perturb": Everything(), "gamma": 1.0}, {}, {"perturb": Suffix("middle"), "gamma": 1.0}],
    ids=["SAM", "the default", "a suffix"],
)
def test_a_term_that_shares_the_graph_of_the_ascent_pass_can_be_added(options):
    """Its gradient is the one at theta. With a suffix, the first step finds that there is one."""
    torch.manual_seed(0)
    model, (x, y) = Keeping(), (torch.randn(8, 4), torch.randint(3, (8,)))
    optimizer = ESAM(sgd(model), model, **options)
    losses = lambda x, y: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    for step in range(3):
        optimizer.zero_grad()
        loss = optimizer.loss(losses, x, y)
        wanted = torch.autograd.grad(model.term, [*model.aux.parameters()], retain_graph=True)
        (loss + model.term).backward()
        if step:  # ESAM's own gradient of these is none
            for parameter, gradient in zip(model.aux.parameters(), wanted, strict=True):
                assert torch.equal(parameter.grad, gradient)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()


def test_the_graph_is_not_kept_longer_for_a_term_that_is_detached():
    """Otherwise every step would need the memory of two graphs."""
    torch.manual_seed(0)
    model, (x, y) = Keeping(), (torch.randn(8, 4), torch.randint(3, (8,)))
    optimizer = ESAM(sgd(model), model, perturb=Everything(), gamma=1.0)
    freed = []

    def losses(x, y):
        found = F.cross_entropy(model(x), y, reduction="none")
        model.term = model.term.detach()
        freed.append(found)
        return found

    optimizer.step(losses, x, y)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        freed[0].sum().backward()
