"""Results on disk and in tables."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["markdown", "mean_and_error", "show", "summary_text", "write_json", "write_tables"]


def mean_and_error(values: Sequence[float]) -> str:
    """Return "mean ± standard error (n)", the error only if there are two values or more."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f} (1)"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.2f} ± {error:.2f} ({len(values)})"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others numbers."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=140)
    console.print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(columns))) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def summary_text(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown page with one table."""
    return f"# {title}\n\n{markdown(columns, rows)}"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, creating its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def write_tables(
    folder: Path, name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table and write it to NAME.md."""
    show(title, columns, rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(summary_text(title, columns, rows), "utf-8")
