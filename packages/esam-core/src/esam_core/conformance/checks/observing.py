"""What sessions return: copies that later steps do not change."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter, Observed, Session
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import equal_all
from esam_core.conformance.problems import batchnorm
from esam_core.conformance.trace import Run, shows

__all__ = ["CHECKS"]


@check()
def check_results_are_copies(adapter: Adapter) -> None:
    """What a session has returned does not change in a later step.

    Otherwise the checks of what a step leaves as it was would compare memory with itself.
    """
    problem = batchnorm()
    session = Run(problem=problem, esam={"rho": 0.3, "beta": 0.5, "gamma": 0.5}).on(adapter)
    shown = session.step(problem.batches[0])
    given = {"observed": _arrays(shown), **_read(adapter, session)}
    kept = {name: {n: np.array(a) for n, a in arrays.items()} for name, arrays in given.items()}
    session.step(problem.batches[1])
    for name, arrays in given.items():
        equal_all(f"{name}, read before a step, after it", arrays, kept[name])


def _arrays(shown: Observed) -> dict[str, Any]:
    """Return the arrays of an observation by name."""
    values = {spec.name: getattr(shown, spec.name) for spec in fields(shown)}
    gradient: Mapping[str, Any] = values.pop("gradient") or {}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return {**arrays, **{f"gradient of {name}": g for name, g in gradient.items()}}


def _read(adapter: Adapter, session: Session) -> dict[str, Mapping[str, Any]]:
    """Return all arrays that a session returns, by the names of its methods."""
    found: dict[str, Mapping[str, Any]] = {
        "weights()": session.weights(),
        "buffers()": session.buffers(),
    }
    if shows(adapter, "backward"):
        found["gradients()"] = session.gradients()
    return found


CHECKS = (check_results_are_copies,)
