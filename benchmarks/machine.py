"""The machine, versions and command of a measurement."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import esam_core
import esam_torch

__all__ = ["provenance"]


def _processor() -> str:
    """Return the processor's name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return name


def _revision() -> str:
    """Return the git revision, with a + if the measured code differs from it."""
    root = Path(__file__).parent.parent
    measured = ["packages", "benchmarks/*.py", "benchmarks/*/*.py"]
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", *measured],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+" if changed else "")


def provenance() -> dict[str, Any]:
    """Return machine, versions, command, revision and time, as plain data for JSON."""
    cuda = torch.cuda.is_available()
    return {
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if cuda else None,
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a subclass, which torch.load refuses
            "numpy": np.__version__,
            "esam-core": esam_core.__version__,
            "esam-torch": esam_torch.__version__,
        },
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "revision": _revision(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
