"""Recorded runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from esam_core.conformance import golden
from esam_core.conformance.adapter import Adapter, Observed
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close_all
from esam_core.conformance.trace import Run, compare_observed

__all__ = ["CHECKS"]


def _observation(step: dict[str, Any]) -> Observed:
    """Return a recorded step as the observations of a session."""

    def array(name: str) -> Any:
        return None if step[name] is None else np.asarray(step[name])

    return Observed(
        losses=array("losses"),
        perturbed_losses=array("perturbed_losses"),
        part=array("part"),
        indices=array("indices"),
        sample_weights=array("sample_weights"),
        perturbed=tuple(step["perturbed"]),
        perturbation_norm=step["perturbation_norm"],
        gradient_norm=step["gradient_norm"],
        passes=tuple(step["passes"]),
    )


@check()
def check_golden_traces(adapter: Adapter) -> None:
    """Steps of several configurations match the recording, in every dtype of the backend."""
    _compare(adapter, golden.RUNS)


@check("ascend")
def check_golden_traces_of_directions(adapter: Adapter) -> None:
    """The same for ascent directions other than the whole batch's gradient."""
    _compare(adapter, golden.DIRECTION_RUNS)


def _compare(adapter: Adapter, runs: Mapping[str, Run]) -> None:
    """Require that runs match the recording."""
    traces = golden.load()["traces"]
    for name, run in runs.items():
        for dtype in adapter.dtypes:
            session = run.on(adapter, dtype)
            for i, step in enumerate(traces[name]):
                batch = run.problem.batches[i % len(run.problem.batches)]
                where = f"{name}, {dtype}, step {i}"
                compare_observed(
                    adapter, where, session.step(batch), _observation(step), dtype, gradient=False
                )
                kind = "weights" if run.base.kind == "sgd" else "adaptive weights"
                means = {n: a for n, a in session.buffers().items() if n.endswith(".mean")}
                for what, found, row in (
                    ("weights", session.weights(), kind),
                    ("means", means, "buffers"),
                ):
                    recorded = {n: np.asarray(a) for n, a in step[what].items()}
                    close_all(f"{where}: {what}", found, recorded, kind=row, dtype=dtype)


CHECKS = (check_golden_traces, check_golden_traces_of_directions)
