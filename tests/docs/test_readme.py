"""What the README tells a newcomer to type is what runs here."""

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


def test_its_keras_block_is_the_one_that_is_run_from_the_wheel():
    def blocks(page):
        return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)

    (block,) = blocks(ROOT / "packages" / "esam-keras" / "README.md")
    assert [b for b in blocks(ROOT / "README.md") if "import keras" in b] == [block]
