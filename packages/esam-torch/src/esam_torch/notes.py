"""Notes that explain errors in the user's code: what ESAM was doing when they occurred."""

import contextlib
from collections.abc import Callable, Iterator

from esam_core import ESAMRuntimeError

__all__ = [
    "ACCUMULATES",
    "ASKS",
    "CLOSURE",
    "KEPT",
    "LATE",
    "PLAIN",
    "PRUNED",
    "WITHOUT_A_GRAPH",
    "WITHOUT_PARAMETERS",
    "note_errors",
    "own_backward",
]

WITHOUT_A_GRAPH = (
    "ESAM calls `losses` under torch.no_grad() if only the losses are needed: to find the model's "
    "blocks, and in the selection pass. Compute gradients within `losses` (such as a gradient "
    "penalty) under torch.enable_grad()."
)


PRUNED = (
    "ESAM's ascent pass builds no graph for weights that this step does not perturb, nor for "
    "activations that depend only on such weights. To differentiate with respect to such an "
    "activation within `losses`, call `.requires_grad_()` on it first; with respect to weights, "
    'use `norm="full"`, which keeps the whole graph.'
)


KEPT = (
    "The model keeps tensors of its forward pass in attributes, such as a loss or features. You "
    "may add them to the loss, so from now on the ascent pass computes all gradients, and saves "
    "none. In the first step, gradients through these tensors were incomplete. If you use them "
    "only inside `losses`, detach or delete them there to save gradients again."
)

ACCUMULATES = (
    "The backward of a layer runs a backward of its own, as that of a reversible layer does, so "
    "from now on the ascent pass computes all gradients, and saves none. In the first step, it may "
    "have missed the gradients of such layers."
)

ASKS = (
    "`losses` asks which parameters have a gradient (`requires_grad`), so the ascent pass computes "
    "all gradients, and saves none. Choose the parameters outside `losses`, once, to save them."
)

PLAIN = (
    "step() without a backward of optimizer.loss(losses, ...) since the last one: this update is "
    "the base optimizer's own, without sharpness-aware gradients."
)

LATE = (
    "A forward wrote to a frozen weight or a buffer that ESAM had not copied, because it was not "
    "written in the first steps or is larger than all trained weights. From now on it is written "
    "once per step, as without ESAM; in this step, later passes read what the first one wrote."
)


CLOSURE = (
    "A closure given to step() must call the backward of optimizer.loss(losses, ...). Received: a "
    "closure that did not. Without a closure: loss = optimizer.loss(losses, inputs, targets); "
    "loss.backward(); optimizer.step(), where losses(inputs, targets) returns one loss per sample."
)

WITHOUT_PARAMETERS = (
    "`losses` must depend on the model's parameters. Received: losses without a graph. Were they "
    "detached, computed under torch.no_grad(), or computed by a reentrant checkpoint (use "
    "use_reentrant=False)?"
)


@contextlib.contextmanager
def note_errors(
    note: str | Callable[[], str], kind: type[Exception], words: str = ""
) -> Iterator[None]:
    """Add a note to errors of a type raised inside the context, if their message has the words."""
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
    """Explain the error if one of ESAM's backwards needs a graph that has been freed.

    Raises:
        ESAMRuntimeError: instead of torch's error, which advises retain_graph=True.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ESAMRuntimeError(
            "`losses` must itself compute everything that needs a gradient, in each call: ESAM "
            "runs more than one backward, each at other weights. Received: losses that depend on "
            "a value computed outside `losses`, or in an earlier call of it. Compute it inside "
            "`losses`, or detach it."
        ) from error
