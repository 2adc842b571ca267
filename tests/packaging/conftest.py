"""The built distributions for the packaging tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """Return the folder of the built wheels and sdists: `$ESAM_DIST`, or a new build."""
    if folder := os.environ.get("ESAM_DIST"):
        return Path(folder)
    made = tmp_path_factory.mktemp("dist")
    for pyproject in ROOT.glob("packages/*/pyproject.toml"):
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", str(made), str(pyproject.parent)],
            check=True,
            capture_output=True,
        )
    return made
