"""The entry point for development: `nox` runs all checks, `nox -s demo` runs the demo.

Sessions share environments under .nox/, which are created with pip and reused between runs. A
PyTorch installation is large, so all sessions that need one share it and add further packages.
`nox -s SESSION -- ARGUMENTS` passes the arguments on to the session's command.
"""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
DIST = ROOT / "dist"

#: The sessions of `nox -s tests`, in order.
PARTS = (
    "lint",
    "typing",
    "build",
    "docs",
    "conformance",
    "tests_core",
    "tests_torch",
    "tests_keras(tensorflow)",
    "tests_keras(jax)",
    "tests_keras(torch)",
)

#: The adapters for the conformance kit without pytest, in `conformance` and from each built wheel.
ADAPTERS = {
    "esam-core": "esam_core.conformance.numpy_adapter:adapter",
    "esam-torch": "esam_torch.conformance:adapter",
    "esam-keras": "esam_keras.conformance:adapter",
}

#: The extra with which a package is tested in an empty environment; one that its README names.
EXTRAS = {"esam-keras": "[torch]"}


#: Runs a session once for each Keras backend.
BACKENDS = nox.parametrize(
    "backend", [nox.param(name, id=name) for name in ("tensorflow", "jax", "torch")]
)


def lowest(package: str, *names: str) -> tuple[str, ...]:
    """Return dependencies of a package, pinned to the lowest versions that it declares."""
    text = (ROOT / "packages" / package / "pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)["project"]
    extras = project.get("optional-dependencies", {}).values()
    declared = {}
    for requirement in (*project["dependencies"], *(r for extra in extras for r in extra)):
        name, _, bounds = requirement.partition(">=")
        declared[name] = f"{name}=={bounds.partition(',')[0]}"
    return tuple(declared[name] for name in names)


#: The schemas of the files for GitHub.
SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/*_*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}

#: The packages installed when a shared environment is created.
ENVIRONMENTS = {
    # Only NumPy and pytest: esam-core must need nothing else.
    "core": ("-e", "packages/esam-core[test]"),
    "lint": ("ruff", "check-jsonschema"),
    # The lowest versions that the packages declare, all together; and the newest torch.
    "torch-lowest": (
        *("-e", "packages/esam-core[test]", "-e", "packages/esam-torch[fit]"),
        *("-e", "packages/esam-keras", "pytorch-optimizer", "schedulefree", "scikit-learn"),
        *lowest("esam-torch", "torch", "transformers", "accelerate", "lightning", "tensorboard"),
        *(*lowest("esam-core", "numpy"), *lowest("esam-keras", "keras")),
    ),
    # TensorFlow 2.18 and JAX 0.6 need different versions of ml-dtypes.
    "tensorflow-lowest": (
        *("-e", "packages/esam-core[test]", "-e", "packages/esam-keras", "tensorflow-cpu==2.18"),
        *lowest("esam-keras", "keras"),
    ),
    "jax-lowest": (
        *("-e", "packages/esam-core[test]", "-e", "packages/esam-keras"),
        *lowest("esam-keras", "keras", "jax"),
    ),
    "torch-newest": (
        *("-e", "packages/esam-core[test]", "-e", "packages/esam-torch[fit]", "scikit-learn"),
        *("torch==2.14.1", "torchvision==0.29.1", "timm"),
    ),
    # The demo's requirements, and pytest-xdist, which runs tests in parallel.
    "torch": (
        *("-e", "packages/esam-core[test]", "-e", "packages/esam-torch[fit]"),
        *("scikit-learn", "matplotlib", "pytest-xdist"),
    ),
}

#: Additional packages, installed by the sessions that need them.
ADDITIONS = {
    "keras": ("-e", "packages/esam-keras"),
    "backends": ("tensorflow-cpu", "jax"),
    "trainers": (
        *("accelerate", "lightning", "peft", "pytorch-optimizer", "schedulefree", "skorch"),
        *("tensorboard", "tensordict", "torch-geometric", "tqdm", "transformers"),
    ),
    "checks": ("mypy", "build", "twine"),
    "docs": ("sybil", "sphinx", "myst-parser", "furo", "sphinx-copybutton", "peft"),
}


def python_of(session: nox.Session, name: str, *additions: str) -> str:
    """Return the Python of a shared environment, after creating or updating it if needed."""
    folder = ROOT / ".nox" / f"env-{name}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    for part in (name, *additions):
        requirements = ENVIRONMENTS[name] if part == name else ADDITIONS[part]
        # The environment is up to date while none of its inputs has changed.
        stamp = folder / f"{part}.txt"
        local = [p for p in PACKAGES if any(p in requirement for requirement in requirements)]
        sources = (CONSTRAINTS, *(ROOT / "packages" / p / "pyproject.toml" for p in local))
        wanted = "\n".join([sys.version, *requirements, *(s.read_text("utf-8") for s in sources)])
        if not stamp.exists() or stamp.read_text("utf-8") != wanted:
            if part == name:
                new_environment(session, folder)
            pins = folder / "constraints.txt"
            pins.write_text(constraints(name), "utf-8")
            run(session, str(python), "pip", "install", "--quiet", "-c", str(pins), *requirements)
            stamp.write_text(wanted, "utf-8")
    return str(python)


def constraints(name: str) -> str:
    """Return the pins of an environment: its own, and those of constraints.txt for all else."""
    if name.endswith("-lowest"):
        return ""  # The lowest versions declare their own dependencies.
    own = {r.partition("==")[0]: r for r in ENVIRONMENTS[name] if "==" in r}
    pins = CONSTRAINTS.read_text("utf-8").splitlines()
    return "\n".join([*own.values(), *(pin for pin in pins if pin.partition("==")[0] not in own)])


def readme_requirement(package: str) -> str:
    """Return the requirement in a package's README, with the extra used for the test."""
    text = (ROOT / "packages" / package / "README.md").read_text("utf-8")
    (line,) = re.findall(r"^\$ pip install \"?([\w-]+(?:\[\w+\])?)", text, re.MULTILINE)
    name = line.partition("[")[0]
    return f"{name}{EXTRAS.get(name, '')}"


def new_environment(session: nox.Session, folder: Path) -> None:
    """Create an empty environment in a folder, replacing its contents."""
    session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(folder))


def run(session: nox.Session, python: str, *module: str, keras: str = "torch") -> None:
    """Run a Python module with a Keras backend; the torch environment has only torch."""
    # The tests' problems are tiny: a second thread makes them slower, especially on a busy machine.
    env = {"KERAS_BACKEND": keras, "OMP_NUM_THREADS": "1"}
    session.run(python, "-m", *module, env=env)


def run_pytest(
    session: nox.Session, python: str, *where: str, keras: str = "torch", processes: int = 1
) -> None:
    """Run tests and docstring examples: those in `where`, or those that the arguments select.

    All of them run in several processes; the tests of a file run in the same process.
    """
    named = any(Path(argument.partition("::")[0]).exists() for argument in session.posargs)
    chosen = session.posargs if named else (*where, *session.posargs)
    side_by_side = () if named or processes == 1 else (f"-n{processes}", "--dist=loadfile")
    run(session, python, "pytest", "--doctest-modules", *side_by_side, *chosen, keras=keras)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run all checks (the default)."""
    for part in PARTS:
        session.notify(part)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Run ruff's checks, check the formatting, and validate the files for GitHub."""
    python = python_of(session, "lint")
    session.run(python, "-m", "ruff", "check", ".")
    session.run(python, "-m", "ruff", "format", "--check", ".")
    for schema, pattern in SCHEMAS.items():
        files = [str(path) for path in sorted(ROOT.glob(pattern))]
        # The schemas are in the package: nothing is downloaded.
        validate = ("check_jsonschema", "--quiet", "--builtin-schema", f"vendor.{schema}")
        session.run(python, "-m", *validate, *files)


@nox.session(venv_backend="none")
def typing(session: nox.Session) -> None:
    """Run strict mypy on the packages."""
    python = python_of(session, "torch", "keras", "trainers", "checks")
    for package in PACKAGES:
        run(session, python, "mypy", f"packages/{package}/src")


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build wheels and sdists in dist/; run the kit and the README with each alone."""
    python = python_of(session, "torch", "keras", "checks")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        source = f"packages/{package}"
        session.run(python, "-m", "build", "--outdir", str(DIST), source, silent=True)
    run(session, python, "twine", "check", "--strict", *map(str, DIST.iterdir()))
    session.env["ESAM_DIST"] = str(DIST)
    run(session, python, "pytest", "tests/packaging")
    for package in PACKAGES:
        folder = ROOT / ".nox" / f"empty-{package}"
        alone = str(folder / Path(python).relative_to(ROOT / ".nox" / "env-torch"))
        new_environment(session, folder)
        install = ("pip", "install", "--quiet", "-c", str(CONSTRAINTS), "--find-links", str(DIST))
        run(session, alone, *install, readme_requirement(package))
        run(session, alone, "pip", "check")
        run(session, alone, "esam_core.conformance", "--quiet", ADAPTERS[package])
        # Run it as a script, not as a module: the checkout must not be on its path.
        blocks = ("tests/packaging/readme_blocks.py", f"packages/{package}/README.md")
        session.run(alone, *blocks, env={"KERAS_BACKEND": "torch"})
        shutil.rmtree(folder)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the pages; run their Python blocks, those of the READMEs, and examples/."""
    python = python_of(session, "torch", "keras", "trainers", "docs")
    run(session, python, "sphinx", *("-E", "-W", "--keep-going", "-q", "docs", "docs/_build/html"))
    run(session, python, "pytest", "tests/docs", "tests/examples", *session.posargs)


@nox.session(venv_backend="none")
def conformance(session: nox.Session) -> None:
    """Run the conformance kit without pytest, on the reference and on each backend."""
    python = python_of(session, "torch", "keras")
    for adapter in session.posargs or ADAPTERS.values():
        run(session, python, "esam_core.conformance", adapter)


@nox.session(venv_backend="none")
def tests_core(session: nox.Session) -> None:
    """Run esam-core's tests and docstring examples, with only NumPy and pytest."""
    python = python_of(session, "core")
    run_pytest(session, python, "tests/core", "packages/esam-core/src")


@nox.session(venv_backend="none")
def tests_torch(session: nox.Session) -> None:
    """Run the tests of esam-torch, the benchmarks and the demo, and docstring examples."""
    python = python_of(session, "torch", "keras", "trainers")
    where = ("tests/torch", "tests/benchmarks", "tests/demo", "packages/esam-torch/src")
    run_pytest(session, python, *where, processes=2)


def quick_on(backend: str) -> tuple[str, ...]:
    """Return the options that leave the slow tests of esam-keras out, except on torch.

    Compiling them takes minutes on the other backends, where `keras_suites` runs them.
    """
    return () if backend == "torch" else ("-m", "not slow")


@nox.session(venv_backend="none")
@BACKENDS
def tests_keras(session: nox.Session, backend: str) -> None:
    """Run esam-keras's tests and docstring examples, one Keras backend per process."""
    python = python_of(session, "torch", "keras", "backends")
    where = ("tests/keras", "packages/esam-keras/src", *quick_on(backend))
    run_pytest(session, python, *where, keras=backend, processes=2)


@nox.session(venv_backend="none")
def tests_torch_lowest(session: nox.Session) -> None:
    """Run esam-torch's tests with the lowest torch and trainers that it declares."""
    python = python_of(session, "torch-lowest")
    run_pytest(session, python, "tests/torch")


@nox.session(venv_backend="none")
def tests_torch_newest(session: nox.Session) -> None:
    """Run esam-torch's tests with the newest torch, torchvision and timm."""
    python = python_of(session, "torch-newest", "trainers")
    run_pytest(session, python, "tests/torch", "tests/zoo", "packages/esam-torch/src")


@nox.session(venv_backend="none")
@BACKENDS
def tests_keras_lowest(session: nox.Session, backend: str) -> None:
    """Run esam-keras's tests with the lowest Keras and the lowest backend that it declares."""
    python = python_of(session, f"{backend}-lowest")
    run_pytest(session, python, "tests/keras", *quick_on(backend), keras=backend)


@nox.session(venv_backend="none")
@BACKENDS
def keras_suites(session: nox.Session, backend: str) -> None:
    """Run Keras's own tests with ESAM at rho = 0 as the optimizer, and the slow tests of ours."""
    python = python_of(session, "torch", "keras", "backends")
    env = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    session.run(python, "tests/keras_suites/compare.py", *session.posargs, env=env)
    if not session.posargs:
        run(session, python, "pytest", "tests/keras", "-m", "slow", keras=backend)


@nox.session(venv_backend="none")
def models(session: nox.Session) -> None:
    """Test the losses per sample of all models that transformers can build; write the docs page."""
    python = python_of(session, "torch", "trainers")
    results = Path(session.create_tmp()) / "models.jsonl"  # an interrupted run resumes
    page = ("--table", "docs/transformers-models.md")
    options = ("--out", str(results), *(session.posargs or page))
    session.run(python, "tests/models/sweep.py", *options, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train with SGD, SAM and ESAM on real images; show a table, curves and landscapes."""
    python = python_of(session, "torch")
    session.run(python, "-m", "demo", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure the cost of a step, in time and FLOPs, relative to a base step."""
    python = python_of(session, "torch", "keras", "trainers")
    session.run(python, "-m", "benchmarks", *(session.posargs or ["speed"]))
