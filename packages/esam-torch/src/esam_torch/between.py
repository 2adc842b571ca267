"""Between a loss and its backward: what the later passes of a step must find as the first did."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esam_core import ESAMRuntimeError
from esam_torch.batch import Batch
from esam_torch.guards import Modes, Settings
from esam_torch.inputs import Unwritten, changed, read_only
from esam_torch.losses import LossFunction
from esam_torch.task import Task
from esam_torch.variables import Variables

__all__ = ["Between"]


class Between:
    """What the user may change between a loss and its backward; created before the first pass.

    Args:
        task: the inputs of the step.
        losses: the user's function.
        batch: its arguments.
    """

    def __init__(self, task: Task, losses: LossFunction, batch: Batch) -> None:
        self._task = task
        self._losses = losses
        self._batch = batch
        self._settings = Settings(task.layout.devices)

    def read_only(self, *, watched: bool) -> LossFunction:
        """Return `losses` for the passes of the step, which must not change the batch repeatedly.

        Args:
            watched: whether everything is checked in this step.
        """
        return read_only(self._losses, self._batch, watched=watched)

    def note(self, *, watched: bool) -> None:
        """Note what the first pass has found; called once, after it.

        Args:
            watched: whether everything is checked in this step.
        """
        layout = self._task.layout
        self._settings.note()
        self._attributes = layout.attributes.keep(watched=watched)
        self._modes = Modes(layout.modules)
        again, weights = self._task.calls_again, layout.tensors if layout.shards is None else ()
        self._read = Unwritten(self._batch, weights, again=again, watched=watched)
        self._frozen = layout.writes.versions() if again else {}
        self._variables = Variables(self._losses, watched=watched) if again else None

    def check(self) -> None:
        """Raise if something has changed that the later passes would read again.

        Raises:
            ESAMRuntimeError: the batch, weights, buffers or variables of `losses` have changed.
        """
        self._read.check()
        if self._frozen and self._task.layout.writes.written_since(self._frozen):
            raise ESAMRuntimeError(changed("model", "written frozen weights or buffers"))
        if self._variables is not None:
            self._variables.check()

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Use the modes and attributes of the first pass inside the context."""
        with self._modes.restoring(), self._attributes.restoring():
            yield

    def call(self, losses: LossFunction, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call `losses` with the settings of the first pass, and return its result.

        Only `losses`: torch advises against autocast in backward passes.
        """
        return self._settings.call(losses, *args, **kwargs)
