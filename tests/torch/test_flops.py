"""Operations of recurrent layers and attention, which torch's own counter counts as none."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from esam_torch import ESAM, Suffix
from esam_torch.flops import FORMULAS


@pytest.mark.parametrize("layers", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_each_weight_is_multiplied_once_per_time_step(kind, layers):
    layer = kind(3, 5, **layers)
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter, torch.no_grad():
        layer(torch.randn(7, 4, 3))
    assert counter.get_total_flops() == 2 * 7 * 4 * sum(p.numel() for p in matrices)


def test_kernels_of_gpus():
    """With the arguments that their schemas have, as shapes."""
    inputs, weights = (7, 4, 3), [(20, 3), (20, 5), (20,), (20,)]
    wanted = 2 * 28 * (60 + 100)
    aten = torch.ops.aten
    for kernel, arguments in {
        aten._cudnn_rnn: (inputs, weights, 4, None, (1, 4, 5), (1, 4, 5)),
        aten.miopen_rnn: (inputs, weights, 4, (1, 4, 5), (1, 4, 5)),
        aten._lstm_mps: (inputs, [(1, 4, 5)] * 2, weights, True, 1),
    }.items():
        names = [argument.name for argument in kernel.default._schema.arguments]
        assert names[arguments.index(weights)] in ("weight", "params")
        assert FORMULAS[kernel](*arguments, out_shape=()) == wanted


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_suffix_ends_before_a_recurrent_layer_that_does_most_of_the_work(kind):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.recur = kind(8, 32, batch_first=True)
            self.head = nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.recur(self.embed(x))[0][:, -1])

    model = Tagger()
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), model, perturb=Suffix(0.5))
    optimizer.step(lambda x: model(x).square().sum(1), torch.randn(6, 5, 4))
    assert optimizer.report.perturbed == ("head.weight", "head.bias")


def test_attention_costs_the_same_in_one_kernel():
    """On a CPU, torch's counter knows no formula for the kernel."""
    query, key, value = (torch.randn(2, 4, n, 8) for n in (16, 24, 24))

    def by_hand():
        return torch.softmax(query @ key.mT, -1) @ value

    def counted(attend):
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with counter, torch.no_grad():
            attend()
        return counter.get_total_flops()

    assert counted(by_hand) == 2 * 2 * (2 * 4 * 16 * 24 * 8)
    assert counted(lambda: F.scaled_dot_product_attention(query, key, value)) == counted(by_hand)
