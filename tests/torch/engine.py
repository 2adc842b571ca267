"""Backward passes in another thread of the autograd engine, as on an accelerator."""

import threading

import torch

#: The engine uses its own threads from this depth of nested backward passes on.
DEPTH = 60


class _Deeper(torch.autograd.Function):
    """Runs a function in its backward, in a thread of the engine."""

    @staticmethod
    def forward(ctx, x, run, depth):
        ctx.run, ctx.depth = run, depth
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if threading.current_thread() is not threading.main_thread():
            ctx.run()
        else:
            assert ctx.depth <= 2 * DEPTH, "the engine still uses the main thread"
            _nest(ctx.run, ctx.depth + 1)
        return gradient, None, None


def _nest(run, depth):
    with torch.enable_grad():
        start = torch.zeros((), requires_grad=True)
        _Deeper.apply(start, run, depth).backward()


def backward_in_a_thread_of_the_engine(loss):
    """Run `loss.backward()` in a thread of the engine, with the settings of this thread."""
    _nest(lambda: loss.backward(), 0)
