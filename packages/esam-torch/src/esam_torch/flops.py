"""Floating-point operations that torch's counter does not count.

These are recurrent layers in one kernel, and attention on CPUs and Apple GPUs.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

from torch.utils.flop_counter import sdpa_flop_count

from esam_torch.compat import ATTENTION_KERNELS, RECURRENT_KERNELS

__all__ = ["FORMULAS"]

_Shape = Sequence[int]


def _multiplied(inputs: _Shape, weights: Iterable[_Shape]) -> int:
    """Return the operations of products of each time step of each sequence with some matrices.

    Args:
        inputs: (time, batch, features), (batch, time, features), or (elements, features) if packed.
        weights: the shapes of matrices and biases, which are not counted.
    """
    return 2 * prod(inputs[:-1]) * sum(prod(shape) for shape in weights if len(shape) == 2)


def _one_layer(inputs: _Shape, *rest: Any, **_: Any) -> int:
    """Return the operations of `mkldnn_rnn_layer`: one layer in one direction, on a CPU."""
    return _multiplied(inputs, rest[:4])


def _weights_second(inputs: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    """Return the operations of `_cudnn_rnn` and `miopen_rnn`: all layers, on a GPU."""
    return _multiplied(inputs, weights)


def _weights_third(inputs: _Shape, _: Any, weights: Sequence[_Shape], *__: Any, **___: Any) -> int:
    """Return the operations of `_lstm_mps`: all layers, on an Apple GPU."""
    return _multiplied(inputs, weights)


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Return the operations of `scaled_dot_product_attention`, as torch counts them on a GPU."""
    count: Callable[..., int] = sdpa_flop_count  # which has no annotations
    return count(query, key, value)


#: Formulas for `FlopCounterMode`, which passes shapes in place of tensors.
FORMULAS: dict[Any, Callable[..., int]] = {
    **dict(
        zip(
            RECURRENT_KERNELS,
            (_one_layer, _weights_second, _weights_second, _weights_third),
            strict=True,
        )
    ),
    **dict.fromkeys(ATTENTION_KERNELS, _attention),
}
