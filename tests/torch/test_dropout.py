"""Evaluation without dropout ends, whatever interrupts it."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esam_torch.dropout import NoiselessEvaluation, WithoutDropout

ONES = torch.ones(1000)


def drops():
    """Return whether dropout drops entries now."""
    return not torch.equal(F.dropout(ONES, 0.5), ONES)


def leave_modes():
    """Leave all modes: after an interrupt, one that does nothing may remain."""
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()


@pytest.fixture(autouse=True)
def no_modes():
    leave_modes()
    yield
    leave_modes()


def test_it_begins_and_ends():
    layers, evaluation = [nn.Dropout(), nn.BatchNorm1d(2)], NoiselessEvaluation()
    evaluation.end()  # it has not begun
    evaluation = NoiselessEvaluation()
    evaluation.begin(layers)
    assert not drops() and not any(layer.training for layer in layers)
    for _ in range(2):
        evaluation.end()
        assert drops() and all(layer.training for layer in layers)
        assert torch._C._len_torch_function_stack() == 0


def test_an_error_while_it_begins():
    def layers():
        yield layer
        raise KeyboardInterrupt

    layer, evaluation = nn.Dropout(), NoiselessEvaluation()
    with pytest.raises(KeyboardInterrupt):
        evaluation.begin(layers())
    assert not layer.training
    evaluation.end()
    assert layer.training and drops()


def test_a_mode_that_torch_activates_again_does_nothing():
    """As when the generator in which torch has left it for a call is deleted after an interrupt."""
    evaluation = NoiselessEvaluation()
    evaluation.begin([])
    left = torch.overrides._pop_mode_temporarily()
    with contextlib.suppress(KeyboardInterrupt):
        left.__enter__()
        raise KeyboardInterrupt
    evaluation.end()
    assert drops()
    del left  # torch activates it again
    assert torch._C._len_torch_function_stack() == 1
    assert drops()


@pytest.mark.parametrize("positional", [True, False])
def test_attention(positional):
    x = torch.randn(1, 3, 8)
    attention = nn.MultiheadAttention(8, 2, dropout=0.9, batch_first=True)
    expected = F.scaled_dot_product_attention(x, x, x)
    with WithoutDropout():
        found = (
            F.scaled_dot_product_attention(x, x, x, None, 0.9)
            if positional
            else F.scaled_dot_product_attention(x, x, x, dropout_p=0.9)
        )
        several = attention(x, x, x)[0]
    assert torch.equal(found, expected)
    assert torch.allclose(several, attention.eval()(x, x, x)[0], atol=1e-6)
