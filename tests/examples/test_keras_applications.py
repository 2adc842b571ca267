"""The examples run as scripts, in their smallest form."""

import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_keras_applications(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "keras_applications.py"), "--quick"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    title, header, *rows = done.stdout.splitlines()
    assert "48 images, 1 epochs" in title
    assert header.split() == ["optimizer", "loss", "accuracy", "s/epoch"]
    base, esam = (row.split() for row in rows)
    assert (base[0], esam[0]) == ("base", "ESAM")
    assert all(math.isfinite(float(number.rstrip("%"))) for number in base[1:] + esam[1:])
