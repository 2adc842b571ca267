"""Notes on errors of the user's own code: what ESAM was doing when they came."""

import contextlib
from collections.abc import Callable, Iterator

from esam_core import ESAMRuntimeError

__all__ = [
    "CLOSURE",
    "LATE",
    "PRUNED",
    "WITHOUT_A_GRAPH",
    "WITHOUT_PARAMETERS",
    "note_errors",
    "own_backward",
]

WITHOUT_A_GRAPH = (
    "ESAM calls `losses` under torch.no_grad() where only the losses are needed: to find the "
    "model's blocks, and in the selection pass. Take gradients within `losses` (a penalty's, say) "
    "under torch.enable_grad()."
)


PRUNED = (
    "ESAM's ascent builds no graph for weights that this step does not perturb, nor for "
    "activations that depend on such weights alone. To differentiate with respect to such an "
    "activation within `losses`, call `.requires_grad_()` on it first; with respect to weights, "
    'use `norm="full"`, which keeps the whole graph.'
)


LATE = (
    "A forward has written a frozen weight or a buffer of which ESAM had made no copy, since it "
    "was not written in the first steps or is larger than all trained weights. It is written once "
    "a step, as without ESAM, but in this step the later passes read what the first had written."
)


CLOSURE = (
    "A closure given to step() must call the backward of optimizer.loss(losses, ...). Received: a "
    "closure that did not. Without a closure: loss = optimizer.loss(losses, inputs, targets); "
    "loss.backward(); optimizer.step(), where losses(inputs, targets) returns one loss per sample."
)

WITHOUT_PARAMETERS = (
    "`losses` must depend on the model's parameters. Received: losses without a graph. "
    "Were they detached, computed under torch.no_grad(), or by a reentrant checkpoint "
    "(give it use_reentrant=False)?"
)


@contextlib.contextmanager
def note_errors(
    note: str | Callable[[], str], kind: type[Exception], words: str = ""
) -> Iterator[None]:
    """Add a note to errors of a kind that pass by, if their message has the words."""
    try:
        yield
    except kind as error:
        if words in str(error):
            text = note if isinstance(note, str) else note()
            if text not in getattr(error, "__notes__", ()):
                error.add_note(text)
        raise


@contextlib.contextmanager
def own_backward() -> Iterator[None]:
    """Say what to do if one of ESAM's backwards runs through a graph that is gone.

    Raises:
        ESAMRuntimeError: in the place of torch's error, which advises retain_graph=True.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ESAMRuntimeError(
            "`losses` must compute everything that needs a gradient itself, in each call: ESAM "
            "goes backward more than once, each time at other weights. Received: losses that "
            "depend on something computed outside `losses`, or in an earlier call of it. Compute "
            "it inside `losses`, or detach it."
        ) from error
