"""Proportional selection is unbiased for the whole batch's gradient; the paper's is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, All, Everything, Proportional, Random, TopIncrease, TopLoss

DRAWS = 1500


def gradients(select: object, draws: int) -> torch.Tensor:
    """Return (draws, P) descent gradients of a selector, at fixed weights."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    targets = torch.arange(12) % 3
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ESAM(base, model, rho=0.5, perturb=Everything(), select=select)
    rows = []
    for _ in range(draws):
        optimizer.zero_grad()
        optimizer.backward(losses, inputs, targets)
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


WHOLE = gradients(All(), 1)[0]


@pytest.mark.parametrize(
    "select",
    [
        Random(0.5),
        Proportional(0.5),
        Proportional(0.5, score="increase"),
        Proportional(0.25, score="loss", floor=0.2),
    ],
    ids=str,
)
def test_random_and_proportional_draws_average_to_the_whole_batch(select: object) -> None:
    drawn = gradients(select, DRAWS)
    standard_error = float(torch.sqrt(drawn.var(0).sum() / DRAWS))
    # An unbiased mean differs by about one standard error; four is a safe bound.
    assert float((drawn.mean(0) - WHOLE).norm()) < 4 * standard_error
    assert standard_error < 0.1 * float(WHOLE.norm()), "too few draws to show a bias"


@pytest.mark.parametrize("select", [TopIncrease(0.5), TopLoss(0.5)], ids=str)
def test_the_largest_increases_and_losses_are_biased(select: object) -> None:
    assert float((gradients(select, 1)[0] - WHOLE).norm()) > 0.5 * float(WHOLE.norm())
