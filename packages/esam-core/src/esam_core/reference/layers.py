"""A few layers with hand-written derivatives.

A layer function returns its output and a function that takes dL/d(output) and returns
dL/d(input) and dL/d(parameter) for each of its own parameters, by role ("weight", "bias").
Channels are the last axis.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "batchnorm",
    "batchnorm_running",
    "carry",
    "conv",
    "dense",
    "dropout",
    "embedding",
    "global_mean",
    "relu",
    "softmax_cross_entropy",
    "tanh",
]

Array = NDArray[Any]
Backward = Callable[[Array], tuple[Array, dict[str, Array]]]


def dense(x: Array, weight: Array, bias: Array | None) -> tuple[Array, Backward]:
    """Return x W + b, for x (b, in) and W (in, out)."""

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        gradients = {"weight": x.T @ dy}
        if bias is not None:
            gradients["bias"] = dy.sum(axis=0)
        return dy @ weight.T, gradients

    y = x @ weight
    return (y if bias is None else y + bias), backward


def conv(x: Array, weight: Array, bias: Array | None) -> tuple[Array, Backward]:
    """Return y[b, i, j, o] = sum of x[b, i+u, j+v, c] W[u, v, c, o] over u, v, c, plus a bias."""
    height, width = weight.shape[:2]
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    offsets = [(u, v) for u in range(height) for v in range(width)]

    def window(u: int, v: int) -> tuple[slice, slice, slice]:
        return slice(None), slice(u, u + rows), slice(v, v + columns)

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        dx, dweight = np.zeros_like(x), np.zeros_like(weight)
        for u, v in offsets:
            dx[window(u, v)] += dy @ weight[u, v].T
            dweight[u, v] = np.tensordot(x[window(u, v)], dy, axes=((0, 1, 2), (0, 1, 2)))
        gradients = {"weight": dweight}
        if bias is not None:
            gradients["bias"] = dy.sum(axis=(0, 1, 2))
        return dx, gradients

    y = np.zeros((x.shape[0], rows, columns, weight.shape[3]), dtype=x.dtype)
    for u, v in offsets:
        y += x[window(u, v)] @ weight[u, v]
    return (y if bias is None else y + bias), backward


def batchnorm(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Backward, Array, Array]:
    """Normalise by the batch's mean and biased variance, and return these too."""
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axis=axes), x.var(axis=axes)
    inverse = 1.0 / np.sqrt(variance + np.asarray(eps, x.dtype))
    normal = (x - mean) * inverse

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        dnormal = dy * weight
        # The mean and the variance depend on x too: the components of dnormal along 1 and along
        # `normal` cancel.
        dx = inverse * (
            dnormal - dnormal.mean(axis=axes) - normal * (dnormal * normal).mean(axis=axes)
        )
        return dx, {"weight": (dy * normal).sum(axis=axes), "bias": dy.sum(axis=axes)}

    return normal * weight + bias, backward, mean, variance


def batchnorm_running(
    x: Array, weight: Array, bias: Array, mean: Array, variance: Array, eps: float
) -> tuple[Array, Backward]:
    """Normalise by running statistics, which are constants here."""
    axes = tuple(range(x.ndim - 1))
    inverse = 1.0 / np.sqrt(variance + np.asarray(eps, x.dtype))
    normal = (x - mean) * inverse

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        gradients = {"weight": (dy * normal).sum(axis=axes), "bias": dy.sum(axis=axes)}
        return dy * weight * inverse, gradients

    return normal * weight + bias, backward


def carry(x: Array, state: Array) -> tuple[Array, Backward, Array]:
    """Return x + state for a constant state, and the state for the next forward."""

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        return dy, {}

    return x + state, backward, (state + x.mean(axis=tuple(range(x.ndim - 1)))) / 2


def dropout(x: Array, rate: float, noise: Array) -> tuple[Array, Backward]:
    """Keep the elements whose noise, uniform in [0, 1), is at least `rate`."""
    factor = np.asarray(noise >= rate, x.dtype) / np.asarray(1.0 - rate, x.dtype)

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        return dy * factor, {}

    return x * factor, backward


def embedding(x: Array, weight: Array) -> tuple[Array, Backward]:
    """Look up the integers x (b, length) in W (entries, features)."""

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        dweight = np.zeros_like(weight)
        np.add.at(dweight, x, dy)
        return np.zeros(x.shape), {"weight": dweight}  # integers have no derivative

    return weight[x], backward


def tanh(x: Array) -> tuple[Array, Backward]:
    """The hyperbolic tangent, with derivative 1 - y^2."""
    y = np.tanh(x)

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        return dy * (1 - y * y), {}

    return y, backward


def relu(x: Array) -> tuple[Array, Backward]:
    """max(x, 0), with derivative 0 at 0. NaN stays NaN."""
    positive = x > 0

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        return dy * positive, {}

    return np.maximum(x, 0), backward


def global_mean(x: Array) -> tuple[Array, Backward]:
    """Mean over all axes but the first and the last."""
    axes = tuple(range(1, x.ndim - 1))
    places = int(np.prod(x.shape[1:-1]))

    def backward(dy: Array) -> tuple[Array, dict[str, Array]]:
        spread = np.expand_dims(dy / np.asarray(places, dy.dtype), axes)
        return np.broadcast_to(spread, x.shape), {}

    return x.mean(axis=axes), backward


def softmax_cross_entropy(logits: Array, targets: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return the b losses log(sum of exp z_i) - z_i[y_i], and the map w -> d(sum of w_i l_i)/dz."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))

    def backward(weights: Array) -> Array:
        difference = exponentials / totals
        difference[rows, targets] -= 1
        return np.asarray(difference * weights[:, None].astype(logits.dtype))

    return np.log(totals[:, 0]) - shifted[rows, targets], backward
