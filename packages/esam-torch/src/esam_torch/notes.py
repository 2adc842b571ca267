"""Notes on errors of the user's own code: what ESAM was doing when they came."""

import contextlib
from collections.abc import Iterator

__all__ = ["WITHOUT_A_GRAPH", "noted"]

WITHOUT_A_GRAPH = (
    "ESAM calls `losses` under torch.no_grad() where only the losses are needed: to find the "
    "model's blocks, and in the selection pass. Take gradients within `losses` (a penalty's, say) "
    "under torch.enable_grad()."
)


@contextlib.contextmanager
def noted(note: str, kind: type[Exception], words: str = "") -> Iterator[None]:
    """Add a note to errors of a kind that pass by, if their message has the words."""
    try:
        yield
    except kind as error:
        if words in str(error) and note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise
