"""The kit as pytest tests: one decorator. The rest of the kit does not import pytest.

A file of tests needs four lines::

    from esam_core.conformance.testing import conformance

    @conformance(adapter)
    def test_conformance(run):
        run()

Here `adapter` is that of your backend.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.checks import CHECKS
from esam_core.conformance.compare import ConformanceError
from esam_core.conformance.run import check_adapter, run_check

__all__ = ["conformance"]


def _run(adapter: Adapter, name: str) -> None:
    """Run one check: return, raise ConformanceError, or skip with the reason of a declared gap."""
    import pytest

    result = run_check(adapter, name)
    if result.status == "gap":
        pytest.skip(f"declared gap: {result.reason}")
    if result.status == "failed":
        raise ConformanceError(result.reason) from result.error


def conformance(adapter: Adapter) -> Callable[[Any], Any]:
    """Return a decorator that creates one test for each check.

    Args:
        adapter: the backend.

    Returns:
        A decorator for a test function with an argument `run`; calling `run()` runs the check.
        Declared gaps are skipped, with their reasons.
    """
    import pytest

    check_adapter(adapter)
    cases = [pytest.param(partial(_run, adapter, name), id=name) for name in CHECKS]
    return pytest.mark.parametrize("run", cases)
