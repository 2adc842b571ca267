"""The structure of the code: no circular imports, and short files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted(ROOT.glob("packages/*/src/*")), ROOT / "benchmarks"]


def modules(source):
    """Return {module name: path} of a package."""
    return {
        ".".join(
            path.relative_to(source.parent)
            .with_suffix("")
            .parts[: -1 if path.stem == "__init__" else None]
        ): path
        for path in source.rglob("*.py")
    }


def imported(path, known):
    """Return the known modules that a file imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module, `from module import name` this one.
            found |= below & known or {node.module}
    return found & known


def graph(source):
    """Return {module name: the modules of the package that it imports}."""
    paths = modules(source)
    return {name: imported(path, set(paths)) for name, path in paths.items()}


def circle(edges):
    """Return the names along a circle, ending with the first one, or () if there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return (*path[path.index(name) :], name)
        if name in done:
            return ()
        path.append(name)
        found = next(filter(None, map(visit, sorted(edges[name]))), ())
        path.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, sorted(edges))), ())


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_there_are_no_circular_imports(source):
    assert " -> ".join(circle(graph(source))) == ""


def test_the_reference_does_not_import_the_kit():
    (core,) = (source for source in SOURCES if source.name == "esam_core")
    assert [
        (name, other)
        for name, found in graph(core).items()
        for other in found
        if ".reference" in name and ".conformance" in other
    ] == []


def test_a_circle_is_found():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}, "e": {"a"}}
    assert circle(edges) == ("b", "d", "b")
    assert circle({**edges, "d": {"c"}}) == ()
    assert circle({"a": {"a"}}) == ("a", "a")


@pytest.mark.parametrize(
    "folder",
    [
        "packages",
        "benchmarks",
        "tests/core",
        "tests/benchmarks",
        "tests/packaging",
        "tests/outsider",
    ],
)
def test_no_file_is_over_400_lines(folder):
    paths = (ROOT / folder).rglob("*.py")
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in paths}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
