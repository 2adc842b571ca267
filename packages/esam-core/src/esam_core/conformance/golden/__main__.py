"""Record the golden traces again: `python -m esam_core.conformance.golden`."""

import datetime as dt
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

import esam_core
from esam_core.conformance.golden import DIRECTION_RUNS, RUNS, record

#: Next to this file: run the command from a checkout.
PATH = Path(__file__).with_name("traces.json")


def main() -> None:
    """Write the file."""
    data: dict[str, Any] = {
        "provenance": {
            "command": "python -m esam_core.conformance.golden",
            "esam-core": esam_core.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
        },
        "traces": {name: record(run) for name, run in (RUNS | DIRECTION_RUNS).items()},
    }
    # One line per step: changes are readable in a diff, and the file is small.
    traces = ",\n".join(
        f"  {json.dumps(name)}: [\n"
        + ",\n".join("   " + json.dumps(step) for step in steps)
        + "\n  ]"
        for name, steps in data["traces"].items()
    )
    provenance = json.dumps(data["provenance"])
    PATH.write_text(
        f'{{\n "provenance": {provenance},\n "traces": {{\n{traces}\n }}\n}}\n', "utf-8"
    )


if __name__ == "__main__":
    main()
