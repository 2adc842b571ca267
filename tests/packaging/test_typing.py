"""Strict mypy on users' scripts: the packages are typed for their users."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CONFIGURATION = """\
from esam_core import ESAMConfig, Suffix
from esam_core.presets import PRESETS

ESAMConfig.from_arguments(**PRESETS["cifar-resnet18"].arguments())
ESAMConfig(rho=0.1, perturb=Suffix(0.5))
ESAMConfig(norm="full", on_nonfinite="skip")
"""

TORCH = """\
import torch

from esam_core.presets import PRESETS
from esam_torch import ESAM, Part, Suffix

model = torch.nn.Linear(2, 2)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
ESAM(sgd, model, rho=0.2, perturb=Suffix(0.5), gamma=1.0, ascend=Part(0.25))
ESAM(sgd, model, **PRESETS["cifar-resnet18"].arguments())
"""


@pytest.fixture
def mypy(tmp_path):
    """Return a function that runs strict mypy on a script; it returns "" without errors."""

    def run(script):
        path = tmp_path / "script.py"
        path.write_text(script, "utf-8")
        sources = os.pathsep.join(str(src) for src in ROOT.glob("packages/*/src"))
        found = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(path)],
            cwd=tmp_path,
            env={**os.environ, "MYPYPATH": sources},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not found.stderr
        return found.stdout

    return run


@pytest.mark.parametrize("script", [CONFIGURATION, TORCH], ids=["configuration", "torch"])
def test_a_users_script_is_well_typed(mypy, script):
    assert mypy(script) == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('ESAMConfig(norm="l2")', '"norm"'),
        ('ESAMConfig(on_nonfinite="ignore")', '"on_nonfinite"'),
        ("ESAMConfig(perturb=0.5)", '"perturb"'),
    ],
)
def test_a_wrong_option_is_a_type_error(mypy, wrong, message):
    assert message in mypy(f"from esam_core import ESAMConfig\n\n{wrong}\n")
