"""The problems of the kit: small models and batches, as data.

All numbers are multiples of 2**-10 below 4, so that float32 and float64 start from exactly the same
problem. They are drawn from the raw words of a counter-based generator, so that the problems are
the same on every platform and with every version of NumPy.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from esam_core.draws import uniforms
from esam_core.problem import (
    Batch,
    BatchNorm,
    Carry,
    Conv,
    Dense,
    Dropout,
    Embedding,
    GlobalMean,
    Problem,
    Relu,
    Tanh,
)

__all__ = [
    "batches",
    "batchnorm",
    "carry",
    "convolution",
    "dropout",
    "embedding",
    "flat",
    "linear",
    "mlp",
    "numbers",
    "softmax",
    "with_nan",
]

Array = NDArray[Any]

# The kit's own seed, different from all seeds in its configurations.
_SEED = 20220425


def numbers(shape: tuple[int, ...], scale: float, key: int) -> Array:
    """Return numbers in [-scale, scale] on the grid of 2**-10, fixed by the key."""
    drawn = uniforms(int(np.prod(shape)), seed=_SEED, count=key)
    return np.asarray(np.rint((2.0 * drawn - 1.0) * scale * 1024.0) / 1024.0).reshape(shape)


def batches(n: int, size: int, shape: tuple[int, ...], classes: int, key: int) -> tuple[Batch, ...]:
    """Return n batches of the same size: inputs in [-2, 2] and labels of all classes."""
    found = []
    for i in range(n):
        inputs = numbers((size, *shape), 2.0, key + 10 * i)
        labels = uniforms(size, seed=_SEED, count=key + 10 * i + 1) * classes
        found.append(Batch(inputs, labels.astype(np.int64)))
    return tuple(found)


def _dense(name: str, fan_in: int, fan_out: int, key: int, scale: float = 1.0) -> Dense:
    """Return a dense layer with a bias."""
    return Dense(
        name, numbers((fan_in, fan_out), scale, key), numbers((fan_out,), scale / 2, key + 1)
    )


def _norm(name: str, channels: int, key: int) -> BatchNorm:
    """Return a BatchNorm whose parameters and running statistics all have an effect."""
    return BatchNorm(
        name,
        weight=1.0 + numbers((channels,), 0.5, key),
        bias=numbers((channels,), 0.5, key + 1),
        mean=numbers((channels,), 0.5, key + 2),
        variance=1.5 + numbers((channels,), 0.5, key + 3),
    )


def softmax(size: int = 8) -> Problem:
    """Return softmax regression: convex, one layer, two parameters."""
    return Problem("softmax", (_dense("head", 5, 3, 100),), batches(4, size, (5,), 3, 110))


def mlp() -> Problem:
    """Return an MLP with two tanh layers: smooth, six parameters."""
    layers = (
        _dense("first", 6, 7, 200),
        Tanh("first_tanh"),
        _dense("second", 7, 5, 210),
        Tanh("second_tanh"),
        _dense("head", 5, 3, 220),
    )
    return Problem("mlp", layers, batches(6, 8, (6,), 3, 230))


def batchnorm() -> Problem:
    """Return a hidden layer with BatchNorm.

    There is no bias before it: BatchNorm would cancel it, and its gradient would be rounding noise,
    which Adam would amplify.
    """
    layers = (
        Dense("first", numbers((5, 6), 1.0, 300)),
        _norm("norm", 6, 310),
        Tanh("tanh"),
        _dense("head", 6, 3, 320),
    )
    return Problem("batchnorm", layers, batches(4, 8, (5,), 3, 330))


def convolution() -> Problem:
    """Return two convolutions with BatchNorm, a global mean and a dense layer."""
    layers = (
        Conv("stem", numbers((3, 3, 2, 3), 0.5, 400)),
        _norm("stem_norm", 3, 410),
        Relu("relu"),
        Conv("body", numbers((2, 2, 3, 4), 0.75, 420)),
        _norm("body_norm", 4, 430),
        Tanh("tanh"),
        GlobalMean("mean"),
        _dense("head", 4, 3, 440, scale=2.0),
    )
    return Problem("convolution", layers, batches(3, 8, (6, 5, 2), 3, 450))


def dropout() -> Problem:
    """Return a hidden layer followed by dropout."""
    layers = (
        _dense("first", 5, 32, 500),
        Tanh("tanh"),
        Dropout("dropout", 0.5),
        _dense("head", 32, 3, 510),
    )
    return Problem("dropout", layers, batches(3, 8, (5,), 3, 520))


def carry() -> Problem:
    """Return a hidden layer to which the state of earlier forwards is added."""
    layers = (
        _dense("first", 5, 6, 900),
        Carry("carry", numbers((6,), 1.0, 910)),
        Tanh("tanh"),
        _dense("head", 6, 3, 920),
    )
    return Problem("carry", layers, batches(4, 8, (5,), 3, 930))


def embedding() -> Problem:
    """Return a mean of embedded integers; a batch uses only some of them."""
    layers = (
        Embedding("table", numbers((12, 4), 1.0, 600)),
        GlobalMean("mean"),
        _dense("hidden", 4, 5, 610),
        Tanh("tanh"),
        _dense("head", 5, 3, 620),
    )
    found = []
    for i in range(3):
        entries = uniforms(8 * 3, seed=_SEED, count=630 + 10 * i) * 12
        labels = uniforms(8, seed=_SEED, count=631 + 10 * i) * 3
        found.append(
            Batch(entries.astype(np.int64).reshape(8, 3), labels.astype(np.int64)),
        )
    return Problem("embedding", layers, tuple(found))


def flat(size: int = 8) -> Problem:
    """Return a layer without bias, with inputs of zero: its gradient is exactly zero."""
    batch = Batch(np.zeros((size, 4)), np.arange(size) % 3)
    return Problem("flat", (Dense("head", numbers((4, 3), 1.0, 700)),), (batch,) * 3)


def linear(size: int = 8) -> Problem:
    """Return a layer whose loss is linear in theta, because it is certain of a wrong class.

    The probability of that class is exactly 1: the gradient does not depend on theta.
    """
    head = Dense("head", numbers((5, 3), 1.0, 800), np.array([0.0, 0.0, 64.0]))
    labels = np.arange(size) % 2
    batch = Batch(numbers((size, 5), 2.0, 810), labels)
    return Problem("linear", (head,), (batch,) * 4)


def alike(size: int = 8) -> Problem:
    """Return six linear layers that pass on their inputs, so that their gradients are equal."""
    layers = tuple(Dense(f"layer{i}", np.eye(6), np.zeros(6)) for i in range(6))
    inputs = np.tile([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], (size, 1))
    batch = Batch(inputs, np.zeros(size, dtype=np.int64))
    return Problem("alike", (*layers, _dense("head", 6, 3, 1000)), (batch,) * 3)


def peak() -> Problem:
    """Return a layer at 0 whose loss of the last sample overflows with the radius of `PEAK_RHO`."""
    batch = Batch(np.array([[0.0], [0.0], [0.0], [1e5]]), np.array([0, 1, 0, 1]))
    return Problem("peak", (Dense("head", np.zeros((1, 2))),), (batch,))


#: The radius of `peak` by dtype: the weights stay finite.
PEAK_RHO = {"float32": 1e34, "float64": 1e304}


def with_nan(batch: Batch, sample: int) -> Batch:
    """Return the batch with NaN as the inputs of one sample."""
    inputs = batch.inputs.copy()
    inputs[sample] = np.nan
    return Batch(inputs, batch.targets)
