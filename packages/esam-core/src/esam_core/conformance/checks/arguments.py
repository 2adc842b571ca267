"""Invalid arguments must raise an error that names them."""

from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import ConformanceError, equal_all, require
from esam_core.conformance.problems import softmax
from esam_core.conformance.trace import Run
from esam_core.directions import Part
from esam_core.problem import Batch
from esam_core.samplers import Bernoulli
from esam_core.selectors import TopLoss

__all__ = ["CHECKS"]

_BAD: tuple[tuple[dict[str, Any], str, type[Exception]], ...] = (
    ({"rho": -0.1}, "rho", ValueError),
    ({"rho": float("nan")}, "rho", ValueError),
    ({"rho": float("inf")}, "rho", ValueError),
    ({"rho": "0.1"}, "rho", TypeError),
    ({"beta": 0.0}, "beta", ValueError),
    ({"beta": 1.5}, "beta", ValueError),
    ({"gamma": 0.0}, "gamma", ValueError),
    ({"gamma": 1.5}, "gamma", ValueError),
    ({"gamma": True}, "gamma", TypeError),
    ({"norm": "l2"}, "norm", ValueError),
    ({"norm_eps": 0.0}, "norm_eps", ValueError),
    ({"seed": -1}, "seed", ValueError),
    ({"seed": 0.5}, "seed", TypeError),
    ({"adaptive": "yes"}, "adaptive", TypeError),
    ({"on_nonfinite": "ignore"}, "on_nonfinite", ValueError),
    ({"beta": 0.5, "perturb": Bernoulli(0.5)}, "beta", ValueError),
    ({"gamma": 0.5, "select": TopLoss(0.5)}, "gamma", ValueError),
    ({"perturb": Bernoulli}, "perturb", TypeError),
    ({"select": 0.5}, "select", TypeError),
    ({"ascend": 0.5}, "ascend", TypeError),
    ({"ascend": Part}, "ascend", TypeError),
    ({"gama": 0.5}, "gama", TypeError),
)


@check()
def check_bad_hyperparameters_are_refused(adapter: Adapter) -> None:
    """Invalid, duplicate or misspelt hyperparameters raise immediately; the message names them."""
    for arguments, name, expected in _BAD:
        raised: Exception | None = None
        try:
            Run(problem=softmax(), esam=arguments).on(adapter)
        except Exception as error:  # the type is checked below
            raised = error
        require(
            isinstance(raised, expected),
            f"{arguments}: expected a {expected.__name__}, got {raised!r}.",
        )
        require(name in str(raised), f"{arguments}: the message does not name {name!r}: {raised}")


@check()
def check_an_empty_batch_is_refused(adapter: Adapter) -> None:
    """A batch without samples raises a ValueError and changes nothing."""
    problem = softmax()
    batch = problem.batches[0]
    session = Run(problem=problem, esam={"rho": 0.1}).on(adapter)
    before = session.weights()
    try:
        session.step(Batch(batch.inputs[:0], np.asarray(batch.targets[:0])))
    except ValueError:
        equal_all("weights after an empty batch", session.weights(), before)
    except Exception as error:
        raise ConformanceError(f"an empty batch: expected a ValueError, got {error!r}.") from error
    else:
        raise ConformanceError("an empty batch: expected a ValueError, got none.")


CHECKS = (check_bad_hyperparameters_are_refused, check_an_empty_batch_is_refused)
