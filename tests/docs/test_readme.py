"""What the README tells a newcomer to type is what runs here."""

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
