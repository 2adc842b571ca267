"""Progress on the terminal: a bar by rich or tqdm if installed, else one line per epoch."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Mapping
from typing import Any

from esam_core import ESAMRuntimeError, ESAMValueError, StepReport

__all__ = ["Plain", "RichBar", "Silent", "TqdmBar", "choose_progress", "line"]

_SHOWN = ("train_loss", "sharpness", "eval_loss")


def line(row: Mapping[str, float], epochs: int) -> str:
    """Return an epoch as a line of text."""
    metrics = [name for name in row if name.startswith(("train_", "eval_"))]
    names = dict.fromkeys([*(n for n in _SHOWN if n in row), *metrics])
    numbers = "  ".join(f"{name} {row[name]:.4g}" for name in names)
    width = len(str(epochs))
    return f"epoch {int(row['epoch']):{width}d}/{epochs}  {numbers}  {row['seconds']:.1f} s"


class Silent:
    """Shows nothing. The base class of the others.

    Args:
        epochs: the number of epochs.
        title: text before the bar.
    """

    #: Seconds between updates of the loss, each of which waits for the device.
    interval = 0.5

    def __init__(self, epochs: int, title: str = "") -> None:
        self.epochs = epochs
        self.title = title
        self._next = 0.0

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def start(self, epoch: int, batches: int | None) -> None:
        """Start an epoch with this many batches, or None if unknown."""

    def advance(self, batches: int) -> None:
        """Advance by this many batches."""

    def loss(self, report: StepReport) -> None:
        """Show the mean loss of a batch."""

    def finish(self, row: Mapping[str, float]) -> None:
        """Show an epoch's row."""

    def _due(self) -> bool:
        """Return whether it is time to update the loss."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.interval
        return True


class Plain(Silent):
    """Writes one line per epoch to the standard output."""

    def finish(self, row: Mapping[str, float]) -> None:
        sys.stdout.write(self.title + line(row, self.epochs) + "\n")
        sys.stdout.flush()


class RichBar(Silent):
    """A rich progress bar for the current epoch, and one line for each completed epoch."""

    def __init__(self, epochs: int, title: str = "") -> None:
        super().__init__(epochs, title)
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[loss]}", markup=False),
        )
        self._task: Any = None

    def __enter__(self) -> "RichBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._bar.stop()

    def start(self, epoch: int, batches: int | None) -> None:
        text = f"{self.title}epoch {epoch}/{self.epochs}"
        self._task = self._bar.add_task(text, total=batches, loss="")

    def advance(self, batches: int) -> None:
        self._bar.advance(self._task, batches)

    def loss(self, report: StepReport) -> None:
        if self._due():
            self._bar.update(self._task, loss=f"loss {float(report.loss):.4g}")

    def finish(self, row: Mapping[str, float]) -> None:
        self._bar.remove_task(self._task)
        self._task = None
        self._bar.console.print(
            self.title + line(row, self.epochs), markup=False, highlight=False, soft_wrap=True
        )


class TqdmBar(Silent):
    """A tqdm progress bar for the current epoch, and one line for each completed epoch."""

    def __init__(self, epochs: int, title: str = "") -> None:
        super().__init__(epochs, title)
        self._tqdm: Any = importlib.import_module("tqdm.auto").tqdm
        self._bar: Any = None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, epoch: int, batches: int | None) -> None:
        self._bar = self._tqdm(
            total=batches, desc=f"{self.title}epoch {epoch}/{self.epochs}", leave=False
        )

    def advance(self, batches: int) -> None:
        self._bar.update(batches)

    def loss(self, report: StepReport) -> None:
        if self._due():
            self._bar.set_postfix_str(f"loss {float(report.loss):.4g}", refresh=False)

    def finish(self, row: Mapping[str, float]) -> None:
        self._bar.close()
        self._bar = None
        self._tqdm.write(self.title + line(row, self.epochs))


_BARS: dict[str, type[Silent]] = {"rich": RichBar, "tqdm": TqdmBar}


def choose_progress(progress: bool | str, epochs: int, title: str = "") -> Silent:
    """Return the object that shows the progress.

    Args:
        progress: True: rich, tqdm or plain lines, the first that is installed. False: nothing. Or
            one of "rich", "tqdm" and "plain".
        epochs: the number of epochs.
        title: text before the bar.
    """
    if progress is False:
        return Silent(epochs, title)
    if progress == "plain":
        return Plain(epochs, title)
    if progress is True:
        found = [bar for name, bar in _BARS.items() if importlib.util.find_spec(name)]
        return (found[0] if found else Plain)(epochs, title)
    if progress not in _BARS:
        raise ESAMValueError(
            '`progress` must be True, False, "rich", "tqdm" or "plain". '
            f"Received: progress={progress!r}."
        )
    if importlib.util.find_spec(str(progress)) is None:
        raise ESAMRuntimeError(
            f"progress={progress!r} needs {progress}, which is not installed: "
            f"pip install {progress}."
        )
    return _BARS[str(progress)](epochs, title)
