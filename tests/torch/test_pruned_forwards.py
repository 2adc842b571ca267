"""Forwards that would compute something else without the gradients of some weights."""

import pytest
import torch
from tests.torch.scene import batch, net, sgd
from torch import nn
from torch.nn import functional as F

from esam_torch import ESAM, Everything, Proportional, Suffix, TopIncrease


class Padded(nn.Module):
    """Transformer layers in evaluation mode, and a mean that includes padded positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed = nn.Linear(6, 8)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)
        self.eval()

    def losses(self, x, padding, y):
        hidden = self.layers(self.embed(x), src_key_padding_mask=padding)
        return F.cross_entropy(self.head(hidden.mean(1)), y, reduction="none")


@pytest.mark.parametrize("options", [
    {"perturb": Suffix("head"), "gamma": 1.0},
    {"perturb": Suffix(0.5), "gamma": 1.0},
    {"perturb": Everything(), "select": TopIncrease(0.5)},
], ids=str)  # fmt: skip
def test_attention_to_padded_positions_is_the_same_in_all_passes(options):
    model = Padded()
    torch.manual_seed(1)
    lengths = torch.tensor([5, 3, 2, 4, 5, 1, 2, 3])
    inputs = torch.randn(8, 5, 6), torch.arange(5) >= lengths[:, None], torch.arange(8) % 3
    wanted = model.losses(*inputs).detach()
    optimizer = ESAM(sgd(model), model, rho=1e-9, **options)
    optimizer.step(model.losses, *inputs)
    assert torch.allclose(optimizer.report.losses, wanted)
    if optimizer.report.perturbed_losses is not None:
        assert torch.allclose(optimizer.report.perturbed_losses, wanted, atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


def penalised(model):
    def losses(x, y):
        values = F.cross_entropy(model(x), y, reduction="none")
        return values + 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    return losses


@pytest.mark.parametrize("options", [
    {"gamma": 1.0},
    {"gamma": 0.5},
    {"select": Proportional(0.5)},
], ids=str)  # fmt: skip
def test_a_penalty_on_the_weights_with_a_gradient_covers_all_of_them(options):
    model = net(dropout=0.0)
    wanted = penalised(net(dropout=0.0))(*batch()).detach()
    optimizer = ESAM(sgd(model), model, rho=1e-6, perturb=Suffix("head"), **options)
    with pytest.warns(UserWarning, match="asks which parameters have a gradient") as caught:
        reports = [optimizer.backward(penalised(model), *batch()) for _ in range(3)]
    assert all(torch.allclose(report.losses, wanted) for report in reports)
    assert len(caught) == 1 and caught[0].filename == __file__
