"""Sphinx configuration; build the pages with `nox -s docs`."""

import re

import esam_core

project = "esam"
author = "The esam authors"
project_copyright = author
release = esam_core.__version__
version = release

extensions = [
    *("myst_parser", "sphinx_copybutton"),
    *("sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"),
]
# Copy buttons leave out prompts.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# Docstrings are in Google style; signatures have the types, so descriptions do not.
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
# Docstrings are plain text: `name` is code, and see `as_plain_text` for the rest.
default_role = "code"

html_theme = "furo"
html_title = f"esam {release}"
html_theme_options = {"navigation_with_keys": True}


def skip_reexported(app, what, name, obj, skip, options):  # noqa: ARG001 (Sphinx's signature)
    """Skip objects of another package: they are on that package's page."""
    page = app.env.docname.rpartition("/")[2]
    package = (getattr(obj, "__module__", None) or page).partition(".")[0]
    return True if what == "module" and package != page else skip


#: What is kept: code and *emphasis*. Or what reStructuredText would read as markup.
SPAN_OR_MARKUP = re.compile(r"(`[^`]*`|(?<![\w*])\*[^\s*](?:[^*]*[^\s*])?\*(?![\w*]))|([*|]|_\b)")


def as_plain_text(app, what, name, obj, options, lines):  # noqa: ARG001 (Sphinx's signature)
    """Escape text that is not meant as markup: `*args`, |theta|, "train_"."""
    block = None  # the indentation of the line that opens a literal block or a directive
    doctest = False
    for i, line in enumerate(lines):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        doctest = bool(text) and (doctest or text.startswith(">>>"))
        if block is not None and text and indent <= block:
            block = None
        if block is None and text.startswith(".. "):
            block = indent
        elif block is None and not doctest:
            lines[i] = SPAN_OR_MARKUP.sub(lambda match: match[1] or "\\" + match[2], line)
            block = indent if text.endswith("::") else None


def setup(app):
    """Connect the above; docstrings are escaped before napoleon reads their sections."""
    app.connect("autodoc-skip-member", skip_reexported)
    app.connect("autodoc-process-docstring", as_plain_text, priority=100)
