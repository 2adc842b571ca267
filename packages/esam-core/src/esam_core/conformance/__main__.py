"""The runner: `python -m esam_core.conformance package.module:adapter`. Needs no pytest."""

import argparse
import importlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from esam_core.conformance.checks import CHECKS
from esam_core.conformance.run import run_checks
from esam_core.errors import ESAMValueError

__all__ = ["load_adapter", "main"]

# The attributes that `adapter.Adapter` requires.
_PARTS = ("name", "dtypes", "conventions", "gaps", "session")
_MARKS = {"passed": "passed", "failed": "FAILED", "gap": "gap   "}


def load_adapter(address: str) -> Any:
    """Return the adapter at "package.module:name"; a class or function there is called.

    Raises:
        ESAMValueError: there is nothing at this address, or it is not an adapter.
    """
    module, colon, name = address.partition(":")
    if not (module and colon and name) or module.startswith("."):
        raise ESAMValueError(
            f"The adapter must be given as 'package.module:name'. Received: {address!r}."
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ESAMValueError(f"There is no adapter at {address!r}: {error}.") from error
    adapter = found() if callable(found) and _needs_nothing(found) else found
    absent = [name for name in _PARTS if not hasattr(adapter, name)]
    if absent or isinstance(adapter, type):
        raise ESAMValueError(
            f"The adapter must be an object with {', '.join(_PARTS)}, or a class or function that "
            f"creates one without arguments. Received: {address!r}, {adapter!r}."
        )
    return adapter


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Return whether a class or function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # arguments are missing, or a built-in has no signature
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kit from the command line.

    Args:
        arguments: the command line arguments; default: those of the process.

    Returns:
        The exit status: 0 if no check failed, 1 if a check failed, 2 if there was nothing to run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m esam_core.conformance",
        description="Check a backend of ESAM.",
    )
    parser.add_argument("adapter", help="the adapter, as package.module:name")
    parser.add_argument(
        "-k",
        metavar="TEXT",
        default="",
        dest="pattern",
        help="run only the checks with TEXT in their names",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="list only failures and gaps")
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    names = [name for name in CHECKS if given.pattern in name]
    if not names:
        print(f"No check has {given.pattern!r} in its name.", file=sys.stderr)
        return 2
    try:
        adapter = load_adapter(given.adapter)
        started = time.perf_counter()
        counts = {"passed": 0, "failed": 0, "gap": 0}
        width = max(map(len, names))
        print(f"{adapter.name}: {len(names)} checks")
        for result in run_checks(adapter, names):
            counts[result.status] += 1
            if result.status == "passed" and given.quiet:
                continue
            line = f"{_MARKS[result.status]}  {result.name:<{width}}  {result.seconds:6.2f} s"
            print(f"{line}  {result.reason}".rstrip(), flush=True)
    except ESAMValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['gap']} declared gaps "
        f"in {time.perf_counter() - started:.1f} s"
    )
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
