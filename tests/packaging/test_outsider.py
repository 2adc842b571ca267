"""A third-party backend works with only the wheel of esam-core."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory):
    """Return the Python of an environment with the wheel, the outsider and their dependencies."""
    folder = tmp_path_factory.mktemp("outsider")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    (wheel,) = dist.glob("esam_core-*.whl")
    subprocess.run(
        [
            *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("-c", str(ROOT / "constraints.txt"), str(wheel), str(ROOT / "tests" / "outsider")),
        ],
        check=True,
    )
    return python


def run(python, *arguments):
    """Run Python outside the checkout and without its paths."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=python.parent,
        env=clean,
    )


def test_it_imports_the_wheel_and_no_framework(python):
    found = run(python, "-c", "import esam_core; print(esam_core.__file__)")
    assert "site-packages" in found.stdout, found.stderr
    installed = run(python, "-m", "pip", "list", "--format", "freeze").stdout.split()
    names = {line.partition("==")[0] for line in installed} - {"pip", "setuptools"}
    assert names == {"esam_core", "esam-core", "esam-outsider", "numpy"} & names
    assert {"esam-outsider", "numpy"} < names


def test_it_passes_the_kit(python):
    found = run(python, "-m", "esam_core.conformance", "outsider:adapter")
    assert found.returncode == 0, found.stdout + found.stderr
    assert " 0 failed, 17 declared gaps" in found.stdout
    assert "state: nothing is saved" in found.stdout


def test_a_fault_in_it_is_found(python):
    """With one broken line in its adapter, the kit from the wheel fails."""
    code = (
        "import sys, outsider; from esam_core.conformance.__main__ import main;"
        "right = outsider.Session.perturbation;"
        "outsider.Session.perturbation = lambda self, g, scale: "
        "right(self, g, dict.fromkeys(scale, 1.0));"
        "sys.exit(main(['outsider:adapter', '-q']))"
    )
    found = run(python, "-c", code)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "FAILED  check_radius" in found.stdout
