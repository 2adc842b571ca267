"""Version, workflows, citation and guides agree with the packages."""

import re
import tomllib
from pathlib import Path

import pytest

import esam_core

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))


def read(path):
    return (ROOT / path).read_text("utf-8")


def project(package):
    return tomllib.loads(read(f"packages/{package}/pyproject.toml"))


def test_the_version_is_set_in_one_place():
    literal = re.compile(r'^(?:__version__|version) = "', re.MULTILINE)
    files = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("packages/*/pyproject.toml")]
    found = [path for path in files if literal.search(path.read_text("utf-8"))]
    assert [path.relative_to(ROOT).as_posix() for path in found] == [
        "packages/esam-core/src/esam_core/__init__.py"
    ]


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "esam-core"])
def test_a_backend_requires_the_same_version_of_the_core(package):
    needed = project(package)["project"]["dependencies"]
    assert f"esam-core=={esam_core.__version__}" in needed


def test_the_version_is_the_newest_of_the_changelog():
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0] == esam_core.__version__


def sessions():
    """Return the names of the test sessions in noxfile.py."""
    found = re.findall(r"^@nox\.session.*\n(@BACKENDS\n)?def (\w+)", read("noxfile.py"), re.M)
    backends = ("tensorflow", "jax", "torch")
    return {
        name
        for backend, session in found
        for name in ([f"{session}({b})" for b in backends] if backend else [session])
    } - {"tests", "demo", "bench"}


def test_the_workflows_run_every_session_and_no_other():
    text = read(".github/workflows/tests.yml") + read(".github/workflows/versions.yml")
    lists = re.findall(r"session:\s*\[(.*?)\]", text)
    named = {name.strip() for line in lists for name in line.split(",")}
    named |= set(re.findall(r"^ {10}- (\w+(?:\(\w+\))?)$", text, re.MULTILINE))
    assert named == sessions()


@pytest.mark.parametrize("package", PACKAGES)
def test_the_workflows_run_every_python_that_is_declared(package):
    declared = [
        line.rpartition(" ")[2]
        for line in project(package)["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", line)
    ]
    assert f"python: {declared}".replace("'", '"') in read(".github/workflows/tests.yml")


def test_the_contributors_guide_names_every_session():
    guide = read("CONTRIBUTING.md")
    names = {name.partition("(")[0] for name in sessions()}
    assert [name for name in names if f"-s {name}`" not in guide] == []


def test_all_readmes_have_the_same_install_command():
    line = re.compile(r"^\$ pip install \S+", re.MULTILINE)
    root = line.findall(read("README.md"))
    for package in ("esam-torch", "esam-keras"):
        (said,) = line.findall(read(f"packages/{package}/README.md"))
        assert said in root


def test_recorded_commands_name_no_folder_of_a_machine():
    found = re.compile(r'"command": "[^"]* /\w')
    results = [
        *ROOT.glob("benchmarks/results/*/*.json"),
        *ROOT.glob("benchmarks/results/*/*.jsonl"),
    ]
    assert len(results) > 10
    assert not [path.name for path in results if found.search(path.read_text("utf-8"))]
