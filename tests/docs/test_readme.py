"""The commands in the README are those that are tested."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_test_command_is_that_of_ci():
    last = (ROOT / ".ci" / "run").read_text("utf-8").strip().splitlines()[-1]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"$ {last}\n" in readme
    assert "$ python -m pip install nox && nox -s demo\n" in readme


def test_its_pictures_exist():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "docs/images/landscapes.png" in readme
    assert (ROOT / "docs" / "images" / "landscapes.png").exists()


def test_it_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150


def test_its_links_exist():
    pages = re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    assert pages
    assert [page for page in pages if not (ROOT / page).exists()] == []


def test_its_keras_lines_are_run_from_the_wheel():
    def blocks(page):
        return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)

    (whole,) = blocks(ROOT / "packages" / "esam-keras" / "README.md")
    (lines,) = [b for b in blocks(ROOT / "README.md") if "esam_keras" in b]
    assert [line for line in lines.splitlines() if line not in whole.splitlines()] == []
