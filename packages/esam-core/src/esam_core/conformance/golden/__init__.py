"""Golden traces: runs of several steps as numbers in a file, recorded once from the reference.

A check against the reference changes with the reference. These do not: a change of the
specification is visible here, and must be intended. Regenerate them, and give the reason in the
commit, with

    python -m esam_core.conformance.golden
"""

import json
from importlib import resources
from typing import Any

import numpy as np

from esam_core.conformance.numpy_adapter import NumpyAdapter
from esam_core.conformance.problems import batchnorm, convolution, embedding, mlp, softmax
from esam_core.conformance.trace import Run
from esam_core.directions import Momentum, Part, Previous
from esam_core.problem import Base
from esam_core.samplers import Only, RandomSuffix, Suffix
from esam_core.schedules import Every
from esam_core.selectors import Proportional, Random, TopLoss

__all__ = ["DIRECTION_RUNS", "RUNS", "STEPS", "load", "record"]

#: The number of steps in each trace.
STEPS = 4

#: The recorded runs. They do not depend on a framework's conventions: no weight decay in SGD, a
#: negligible eps in Adam, and running variances that no pass uses.
RUNS: dict[str, Run] = {
    "SAM on softmax regression": Run(
        problem=softmax(), esam={"rho": 0.1, "beta": 1.0, "gamma": 1.0}, base=Base("sgd", lr=0.1)
    ),
    "the paper's ESAM on an MLP": Run(
        problem=mlp(), esam={"rho": 0.05, "beta": 0.6, "gamma": 0.5, "seed": 5}
    ),
    "adaptive, estimated norm, Nesterov": Run(
        problem=mlp(),
        esam={
            "rho": 0.5,
            "beta": 0.5,
            "gamma": 0.75,
            "adaptive": True,
            "norm": "estimated",
            "seed": 3,
        },
        base=Base("sgd", lr=0.05, momentum=0.9, nesterov=True),
    ),
    "a suffix of a convolutional network": Run(
        problem=convolution(), esam={"rho": 0.2, "perturb": Suffix("body"), "gamma": 0.5}
    ),
    "norm layers alone, every second step, AdamW": Run(
        problem=batchnorm(),
        esam={"rho": 0.3, "perturb": Every(2, Only("norm")), "select": TopLoss(0.5)},
        base=Base("adamw", lr=0.01, weight_decay=0.1, eps=1e-16),
    ),
    "random suffixes, proportional selection": Run(
        problem=embedding(),
        esam={
            "rho": 0.2,
            "perturb": RandomSuffix(("table", "hidden"), (0.5, 0.5)),
            "select": Proportional(0.5),
            "seed": 1,
        },
    ),
    "random selection, full norm": Run(
        problem=mlp(),
        esam={"rho": 0.1, "beta": 0.5, "select": Random(0.5), "norm": "full", "seed": 8},
    ),
}

#: The same with ascent directions other than the whole batch's gradient.
DIRECTION_RUNS: dict[str, Run] = {
    "a quarter climbs, the paper's selector": Run(
        problem=batchnorm(),
        esam={"rho": 0.2, "beta": 0.6, "gamma": 0.5, "ascend": Part(0.25), "seed": 5},
    ),
    "along the previous gradient, a suffix": Run(
        problem=convolution(),
        esam={"rho": 0.2, "perturb": Suffix("body"), "gamma": 1.0, "ascend": Previous()},
    ),
    "against the momentum, a random half": Run(
        problem=mlp(),
        esam={"rho": 0.5, "beta": 1.0, "select": Random(0.5), "ascend": Momentum(), "seed": 2},
    ),
}


def record(run: Run) -> list[dict[str, Any]]:
    """Return the observations of each step of the float64 reference, as plain data."""
    session = run.on(NumpyAdapter(), "float64")
    steps = []
    for i in range(STEPS):
        shown = session.step(run.problem.batches[i % len(run.problem.batches)])
        step = {
            name: _plain(getattr(shown, name))
            for name in (
                "perturbed",
                "part",
                "indices",
                "passes",
                "losses",
                "perturbed_losses",
                "sample_weights",
                "perturbation_norm",
                "gradient_norm",
            )
        }
        step["weights"] = {name: _plain(a) for name, a in session.weights().items()}
        step["means"] = {
            name: _plain(a) for name, a in session.buffers().items() if name.endswith(".mean")
        }
        steps.append(step)
    return steps


def _plain(value: Any) -> Any:
    """Return arrays and tuples as lists; floats are written with all their digits."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def load() -> dict[str, Any]:
    """Return the contents of the file: "provenance" and "traces", by the names of all runs."""
    text = resources.files(__package__).joinpath("traces.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
