"""The contents and the metadata of the wheels and sdists."""

import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import esam_core

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))

pytestmark = pytest.mark.parametrize("package", PACKAGES)


def wheel_files(dist, package):
    """Return {name: bytes} of a package's only wheel."""
    (wheel,) = dist.glob(f"{package.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_files(dist, package):
    """Return {name below the sdist's folder: bytes} of a package's only sdist."""
    (sdist,) = dist.glob(f"{package.replace('-', '_')}-*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {m.name.partition("/")[2]: archive.extractfile(m).read() for m in members}


def metadata(files):
    """Return a wheel's METADATA as a message."""
    (name,) = (name for name in files if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(files[name].decode())


def sources(package):
    """Return the files under a package's src/, as the wheel should contain them."""
    src = ROOT / "packages" / package / "src"
    files = (path for path in src.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(src).as_posix(): path.read_bytes() for path in files}


def test_wheel_contains_exactly_the_source_files(dist, package):
    files = wheel_files(dist, package)
    code = {name: data for name, data in files.items() if ".dist-info/" not in name}
    assert code == sources(package)


def test_wheel_is_typed(dist, package):
    assert f"{package.replace('-', '_')}/py.typed" in wheel_files(dist, package)


def test_wheel_contains_the_license(dist, package):
    files = wheel_files(dist, package)
    (name,) = (name for name in files if name.endswith(".dist-info/licenses/LICENSE"))
    assert files[name] == (ROOT / "LICENSE").read_bytes()
    assert metadata(files)["License-Expression"] == "Apache-2.0"


def test_metadata_equals_pyproject(dist, package):
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    said = metadata(wheel_files(dist, package))
    extras = project.get("optional-dependencies", {})
    declared = {
        *(str(Requirement(line)) for line in project["dependencies"]),
        *(
            str(Requirement(f"{line}; extra == '{extra}'"))
            for extra, lines in extras.items()
            for line in lines
        ),
    }
    assert {str(Requirement(line)) for line in said.get_all("Requires-Dist")} == declared
    assert said.get_all("Provides-Extra", []) == sorted(extras)
    assert said["Requires-Python"] == project["requires-python"]
    assert said["Summary"] == project["description"]
    assert said["Version"] == esam_core.__version__
    assert said.get_all("Project-URL") == [f"{k}, {v}" for k, v in project["urls"].items()]
    assert said.get_payload() == (ROOT / "packages" / package / "README.md").read_text()


def test_dependencies_are_few(dist, package):
    needed = metadata(wheel_files(dist, package)).get_all("Requires-Dist")
    always = {r.name for r in map(Requirement, needed) if r.marker is None}
    expected = {
        "esam-core": {"numpy"},
        "esam-torch": {"esam-core", "torch"},
        "esam-keras": {"esam-core", "keras"},
    }
    assert always == expected[package]


def test_sdist_builds_on_its_own(dist, package):
    files = sdist_files(dist, package)
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= set(files)
    code = {
        name.removeprefix("src/"): data for name, data in files.items() if name.startswith("src/")
    }
    assert code == sources(package)


@pytest.mark.parametrize("read", [wheel_files, sdist_files], ids=["wheel", "sdist"])
def test_no_local_paths_are_included(dist, package, read):
    private = [str(ROOT).encode(), str(Path.home()).encode() + b"/"]
    found = [
        name for name, data in read(dist, package).items() if any(path in data for path in private)
    ]
    assert found == []
