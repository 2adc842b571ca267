"""The finished runs of a folder: one JSON line each, in one file.

Several processes may add lines at the same time, and may be killed at any time. Lines are written
under a lock. A line that a kill left incomplete is never read, and is removed by the next write.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.run import Run

__all__ = ["Store", "key_of"]


def key_of(record: Mapping[str, Any]) -> str:
    """Return the key of a record: the key of its run and probe."""
    return Run(**record["run"]).key(record.get("probe"))


class Store:
    """The records in a folder's runs.jsonl.

    Args:
        folder: the folder; created when the first record is added.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runs.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """Return all records, in the order in which the runs finished."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in _whole_lines(self.path.read_bytes())]

    def by_key(self) -> dict[str, dict[str, Any]]:
        """Return all records by their keys."""
        return {key_of(record): record for record in self.records()}

    def find(self, run: Run, probe: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Return the record of a run, or None.

        Args:
            run: the run's options.
            probe: the options of its probe, or None.
        """
        return self.by_key().get(run.key(probe))

    def add(self, record: Mapping[str, Any]) -> bool:
        """Append a record and return True, or return False if its key is already there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(self.path) as file:
            lines = list(_whole_lines(file.read()))
            if key_of(record) in {key_of(json.loads(line)) for line in lines}:
                return False
            file.truncate(sum(map(len, lines)))
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return True


def _whole_lines(content: bytes) -> Iterator[bytes]:
    """Yield the lines that are complete."""
    return (line for line in content.splitlines(keepends=True) if line.endswith(b"\n"))


@contextmanager
def _lock(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read and write, with an exclusive lock."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
