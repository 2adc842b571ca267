"""The history of a training run: one row of numbers per epoch."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from esam_core import ESAMValueError

__all__ = ["History"]


@dataclass
class History:
    """A table with one row per epoch and one named column per number.

    Args:
        rows: the rows, starting with the first epoch. Default: no rows.

    Example:
        >>> rows = [{"epoch": 1, "eval_accuracy": 0.8}, {"epoch": 2, "eval_accuracy": 0.7}]
        >>> history = History(rows)
        >>> history["eval_accuracy"]
        [0.8, 0.7]
        >>> history.best("eval_accuracy")["epoch"]
        1
    """

    rows: list[dict[str, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> list[float]:
        """Return a column, with NaN for epochs that did not measure it."""
        if name not in self.columns:
            raise KeyError(
                f"No {name!r} in this history; its columns are {', '.join(self.columns)}."
            )
        return [row.get(name, float("nan")) for row in self.rows]

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @property
    def last(self) -> dict[str, float]:
        """The row of the last epoch."""
        if not self.rows:
            raise ESAMValueError("The history must contain an epoch. Received: none.")
        return self.rows[-1]

    def best(self, name: str, *, smallest: bool = False) -> dict[str, float]:
        """Return the first row with the best value of a column.

        Args:
            name: a column.
            smallest: whether less is better, as for a loss. Default False.
        """
        values = self[name]
        rows = [row for row, value in zip(self.rows, values, strict=True) if value == value]
        if not rows:
            raise ESAMValueError(
                f"`{name}` must be a number in at least one epoch. Received: {values}."
            )
        return (min if smallest else max)(rows, key=lambda row: row[name])

    def to_csv(self, path: str | Path) -> None:
        """Write a table with a header; numbers that an epoch did not measure are empty."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def to_json(self, path: str | Path) -> None:
        """Write the list of rows."""
        Path(path).write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "History":
        """Read a file that `to_json` wrote."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))
