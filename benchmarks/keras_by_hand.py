"""The passes of the paper's ESAM written by hand for Keras, as a control for the time of our step.

The control perturbs all weights, and has no options, checks, reports or state of its own. It shows
how much of the time of a step is the model's, such as Keras's Python and the compiler.
"""

from typing import Any

import keras
from keras import ops

__all__ = ["RHO", "ByHand"]

RHO = 0.05

Tensor = Any


class ByHand(keras.Sequential):
    """A classifier that is trained by ESAM with all weights and half of the batch."""

    def train_step(self, *arguments: Any) -> Any:
        """Run a step."""
        steps = {"torch": self._torch_step, "tensorflow": self._tensorflow_step}
        return steps.get(keras.backend.backend(), self._jax_step)(*arguments)

    def _torch_step(self, data: Any) -> dict[str, Any]:
        import torch

        x, y = data
        weights = [v.value for v in self.trainable_variables]
        before = _losses(y, self(x, training=True))
        gradients = torch.autograd.grad(before.mean(), weights)
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            epsilons = torch._foreach_mul(gradients, RHO / norm)
            torch._foreach_add_(weights, epsilons)
            increases = _losses(y, self(x, training=True)) - before
            kept = torch.topk(increases, len(y) // 2).indices
        gradients = torch.autograd.grad(
            _losses(y[kept], self(x[kept], training=True)).mean(), weights
        )
        with torch.no_grad():
            torch._foreach_sub_(weights, epsilons)
            self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": before.mean()}

    def _tensorflow_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        (x, y), weights = data, self.trainable_variables
        with tf.GradientTape() as tape:
            before = _losses(y, self(x, training=True))
            mean = tf.reduce_mean(before)
        gradients = tape.gradient(mean, [v.value for v in weights])
        norm = tf.linalg.global_norm(gradients)
        epsilons = [RHO / norm * g for g in gradients]
        for v, epsilon in zip(weights, epsilons, strict=True):
            v.assign_add(epsilon)
        increases = _losses(y, self(x, training=True)) - before
        kept = tf.math.top_k(increases, tf.shape(y)[0] // 2).indices
        with tf.GradientTape() as tape:
            mean = tf.reduce_mean(
                _losses(tf.gather(y, kept), self(tf.gather(x, kept), training=True))
            )
        gradients = tape.gradient(mean, [v.value for v in weights])
        for v, epsilon in zip(weights, epsilons, strict=True):
            v.assign_sub(epsilon)
        self.optimizer.apply(gradients, weights)
        return {"loss": tf.reduce_mean(before)}

    def _jax_step(self, state: Any, data: Any) -> Any:
        import jax

        (x, y), (weights, others, optimizer, metrics) = data, state

        def losses(weights: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
            predictions, left = self.stateless_call(weights, others, x, training=True)
            return _losses(y, predictions), left

        def mean(weights: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
            each, left = losses(weights, x, y)
            return each.mean(), (each, left)

        gradients, (before, _) = jax.grad(mean, has_aux=True)(weights, x, y)
        norm = ops.sqrt(sum(ops.vdot(g, g) for g in gradients))
        climbed = [v + RHO / norm * g for v, g in zip(weights, gradients, strict=True)]
        increases = losses(climbed, x, y)[0] - before
        kept = ops.argsort(increases)[len(y) // 2 :]
        gradients, (_, left) = jax.grad(mean, has_aux=True)(climbed, x[kept], y[kept])
        weights, optimizer = self.optimizer.stateless_apply(optimizer, gradients, weights)
        return {"loss": before.mean()}, (weights, left, optimizer, metrics)


def _losses(y: Tensor, predictions: Tensor) -> Tensor:
    """Return one loss per sample."""
    return keras.losses.sparse_categorical_crossentropy(y, predictions, from_logits=True)
