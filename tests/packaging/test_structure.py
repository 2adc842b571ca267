"""The structure of the code: no circular imports, short files, private names in one place."""

import ast
import re
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


@pytest.mark.parametrize("folder", ["packages", "benchmarks", "tests", "docs", "demo"])
def test_no_file_is_over_400_lines(folder):
    paths = (ROOT / folder).rglob("*.py")
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in paths}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


#: Names with an underscore that may be used outside compat.py. torch's operations on lists of
#: tensors, for the reason in the compat.py of esam-torch; named tuples' documented methods; and
#: attributes of ours on objects of others.
EXEMPT = re.compile("_foreach_[a-z_]+|_fields|_make|_replace|_esam_[a-z]+")


def foreign_names(paths):
    """Return {file name: private names that none of these files defines}, without compat.py."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in paths}
    own, used = set(), {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    own.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(attr=name):
                    names = [name]
                case ast.ImportFrom(module=module) if not (module or "").startswith("esam_"):
                    names = [*(module or "").split("."), *(alias.name for alias in node.names)]
                case ast.Constant(value=str(name)) if name.isidentifier():
                    names = [name]  # as for `getattr`, or in a table
            private = {name for name in names if re.match("_[a-z]", name)}
            if private and path.name != "compat.py":
                used.setdefault(path.name, set()).update(private)
    found = {
        name: {n for n in names - own if not EXEMPT.fullmatch(n)} for name, names in used.items()
    }
    return {name: names for name, names in found.items() if names}


@pytest.mark.parametrize("package", ["esam-torch", "esam-keras"])
def test_private_names_of_frameworks_are_in_one_file(package):
    assert foreign_names((ROOT / "packages" / package).rglob("src/**/*.py")) == {}


def test_private_names_are_found(tmp_path):
    (tmp_path / "compat.py").write_text("torch._here")
    (tmp_path / "a.py").write_text(
        "from torch._dynamo import x\nself._own = torch._foreach_add\nself._own.y._version\n"
        "getattr(model, '_orig_mod')\nself.__dict__\n"
        "{'Adam': '_momentums', 'a': '_own', 'b': '_a b'}"
    )
    names = {"_dynamo", "_version", "_orig_mod", "_momentums"}
    assert foreign_names(tmp_path.glob("*.py")) == {"a.py": names}


#: Names with which code reads the frames of its callers.
STACK = {
    *("_getframe", "_getframemodulename", "currentframe", "extract_stack", "f_back", "walk_stack"),
    *("inspect.stack", "inspect.getouterframes"),
}


def stack_reads(paths):
    """Return {file name: names with which the file reads the stack of its callers}."""
    found = {}
    for path in paths:
        names = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Attribute(attr=name) | ast.Name(id=name):
                    names |= {name, ast.unparse(node)}
                case ast.ImportFrom(module=module):
                    for alias in node.names:
                        names |= {alias.name, f"{module}.{alias.name}"}
        if names & STACK:
            found[path.name] = names & STACK
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_code_reads_the_stack_of_its_callers(source):
    assert stack_reads(source.rglob("*.py")) == {}


def test_reads_of_the_stack_are_found(tmp_path):
    (tmp_path / "a.py").write_text("import sys\nsys._getframe(1).f_back\nnumpy.stack([x])")
    (tmp_path / "b.py").write_text("from inspect import currentframe, stack")
    (tmp_path / "c.py").write_text("import inspect\ninspect.signature(f)\ninspect.stack()")
    (tmp_path / "d.py").write_text("from keras.ops import stack\nstack([x])\nframe")
    assert stack_reads(tmp_path.glob("*.py")) == {
        "a.py": {"_getframe", "f_back"},
        "b.py": {"currentframe", "inspect.stack"},
        "c.py": {"inspect.stack"},
    }
