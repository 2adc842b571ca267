"""Scalars for TensorBoard."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from esam_core import ESAMRuntimeError

__all__ = ["board"]


@contextlib.contextmanager
def board(folder: str | Path | None) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that writes an epoch's row for TensorBoard.

    Args:
        folder: the folder to write to; None to write nothing.

    Raises:
        ESAMRuntimeError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda row: None
        return
    if importlib.util.find_spec("tensorboard") is None:
        raise ESAMRuntimeError(
            "`tensorboard` needs a package that is not installed: "
            "pip install esam-torch[tensorboard]."
        )
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def write(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, int(row["epoch"]))
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
