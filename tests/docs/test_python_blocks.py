"""All Python blocks run: READMEs, docs and the contributors' guide.

The blocks of a page run in order, in one namespace, as in an interactive session. Code that only
the test needs is in an HTML comment above the block:

    <!--- invisible-code-block: python
    import torch
    -->
"""

import os
import re
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

# Keras's default is TensorFlow. The pages run on any of its backends.
os.environ.setdefault("KERAS_BACKEND", "torch")

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "packages/*/README.md")
    for page in ROOT.glob(pattern)
    if "_build" not in page.parts
)
#: Ways to open a Python block. Only the first is executed, so only it may be used.
PYTHON_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*\{?(py\w*)", re.MULTILINE)


def python_blocks(page):
    """Return a parsed page whose examples are its Python blocks."""
    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace["__name__"] = "__main__"
    return document


# Keras's variables do not support NumPy 2's `copy` yet, on TensorFlow and JAX.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, tmp_path, monkeypatch):
    document = python_blocks(ROOT / page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_all_blocks_are_found(page):
    text = (ROOT / page).read_text("utf-8")
    opened = list(PYTHON_FENCE.finditer(text))
    assert {match[1] for match in opened} <= {"python"}
    hidden = len(re.findall(r"<!--+ *invisible-code(?:-block)?: *python", text))
    assert len(list(python_blocks(ROOT / page).examples())) == len(opened) + hidden


def test_a_broken_block_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A page.\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    first, second = python_blocks(page).examples()
    first.evaluate()
    with pytest.raises(AssertionError):
        second.evaluate()
