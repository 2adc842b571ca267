"""Running checks and collecting their results."""

import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from esam_core.conformance.adapter import CAPABILITIES, Adapter, Session
from esam_core.conformance.checks import CHECKS, missing
from esam_core.conformance.compare import ConformanceError
from esam_core.errors import ESAMValueError

__all__ = ["Result", "check_adapter", "run_check", "run_checks"]

#: The dtypes of sessions.
_DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Result:
    """The result of a check.

    Args:
        name: the name of the check.
        status: "passed", "failed" or "gap".
        reason: why it failed, or why the backend declares the gap; "" if passed.
        seconds: how long it took.
        error: the exception of the check, if it failed.
    """

    name: str
    status: str
    reason: str
    seconds: float
    error: Exception | None = None


def check_adapter(adapter: Adapter) -> None:
    """Raise for dtypes that are not known, and for gaps without a known name or a reason."""
    dtypes = adapter.dtypes
    if not isinstance(dtypes, tuple) or not dtypes or not set(dtypes) <= set(_DTYPES):
        raise ESAMValueError(
            f"`dtypes` must be a tuple of one or both of {', '.join(map(repr, _DTYPES))}. "
            f"Received: {dtypes!r}."
        )
    if not isinstance(adapter.gaps, Mapping):
        raise ESAMValueError(
            "`gaps` must be a dictionary of reasons by capability or check. "
            f"Received: {adapter.gaps!r}."
        )
    for name, reason in adapter.gaps.items():
        if name not in CAPABILITIES and name not in CHECKS:
            raise ESAMValueError(
                f"`gaps` must name capabilities ({', '.join(CAPABILITIES)}) or checks. "
                f"Received: {name!r}."
            )
        if not isinstance(reason, str) or not reason:
            raise ESAMValueError(f"`gaps` must give a reason for {name!r}. Received: {reason!r}.")


def run_check(adapter: Adapter, name: str) -> Result:
    """Run one check on a backend, unless the backend lacks a capability that it needs.

    A check that the backend declares as a gap is still run, and must fail: a closed gap must not
    stay declared.
    """
    function = CHECKS[name]
    absent = missing(function, adapter)
    if absent:
        reasons = "; ".join(f"{need}: {adapter.gaps[need]}" for need in absent)
        return Result(name, "gap", reasons, 0.0)
    start = time.perf_counter()
    raised: Exception | None = None
    try:
        function(adapter)
    except Exception as error:
        raised = error
    seconds = time.perf_counter() - start
    if name in adapter.gaps:
        if raised is not None:
            return Result(name, "gap", adapter.gaps[name], seconds)
        raised = ConformanceError(f"it passes, but is declared a gap: {adapter.gaps[name]}")
    if raised is None:
        return Result(name, "passed", "", seconds)
    return Result(name, "failed", _reason(raised), seconds, raised)


def _reason(error: Exception) -> str:
    """Return the message of a failure, with the place of an error that is not the kit's own."""
    if isinstance(error, ConformanceError):
        return str(error)
    if isinstance(error, AttributeError) and error.name in vars(Session):
        return (
            f"the session has no `{error.name}`: implement it, or name the capability that needs "
            "it in `gaps`."
        )
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"


def run_checks(adapter: Adapter, names: Iterable[str] | None = None) -> Iterator[Result]:
    """Run checks, by default all of them, and yield their results."""
    check_adapter(adapter)
    chosen = list(CHECKS if names is None else names)
    unknown = [name for name in chosen if name not in CHECKS]
    if unknown:
        raise ESAMValueError(
            f"`names` must be names of checks: keys of `CHECKS`. Received: {', '.join(unknown)}."
        )
    for name in chosen:
        yield run_check(adapter, name)
