"""Importing a package imports nothing optional."""

import subprocess
import sys
from importlib.metadata import version

import pytest

#: Run in a new interpreter: import argv[2:] after argv[1], and print which of the forbidden
#: packages were imported, installed or not.
WATCHED_IMPORT = """
import importlib, sys

before, module, *forbidden = sys.argv[1:]
if before:
    importlib.import_module(before)

class Watch:
    asked = set()

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in forbidden:
            self.asked.add(root)

sys.meta_path.insert(0, Watch())
importlib.import_module(module)
print(*sorted(Watch.asked))
"""

FRAMEWORKS = ("torch", "tensorflow", "jax", "keras")
EXTRAS = (
    *("accelerate", "lightning", "matplotlib", "pytest", "rich", "scipy", "sklearn", "tensorboard"),
    *("tqdm", "transformers"),
)


def optional_imports(module, forbidden, *, after=""):
    """Return the forbidden packages that `module` tries to import after `after`."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, after, module, *forbidden],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_watch_detects_an_import():
    assert optional_imports("colorsys", ["colorsys"]) == ["colorsys"]


def test_the_watch_detects_an_import_that_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "asks.py").write_text(
        "try:\n    import no_such_package\nexcept ImportError: pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert optional_imports("asks", ["no_such_package"]) == ["no_such_package"]


@pytest.mark.parametrize("module", ["esam_core", "esam_core.reference", "esam_core.conformance"])
def test_core_imports_no_framework(module):
    assert optional_imports(module, FRAMEWORKS + EXTRAS) == []


def test_torch_imports_torch_and_nothing_optional():
    others = tuple(name for name in FRAMEWORKS if name != "torch")
    # Torch itself tries to import some of these, so it is loaded before the watch starts.
    assert optional_imports("esam_torch", others + EXTRAS, after="torch") == []


def test_keras_imports_keras_and_no_other_backend(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    others = tuple(name for name in FRAMEWORKS if name not in ("torch", "keras"))
    assert optional_imports("esam_keras", others + EXTRAS, after="keras") == []


@pytest.mark.parametrize("package", ["esam-core", "esam-torch", "esam-keras"])
def test_version_is_the_metadata_s(package):
    module = package.replace("-", "_")
    printed = subprocess.run(
        [sys.executable, "-c", f"import {module}; print({module}.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == version(package)
