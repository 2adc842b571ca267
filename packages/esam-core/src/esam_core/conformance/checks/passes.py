"""State shared by the passes: running statistics, noise, random generators."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter, Session
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close, close_all, equal, require
from esam_core.conformance.problems import batchnorm, convolution, dropout, mlp
from esam_core.conformance.trace import Run, call_text, follow, shows
from esam_core.directions import Batch, Part, Previous
from esam_core.problem import Base, BatchNorm, Dense, Problem
from esam_core.reference.step import subset
from esam_core.samplers import Bernoulli
from esam_core.schedules import Sometimes
from esam_core.selectors import Proportional, Random

__all__ = ["CHECKS"]


@check()
def check_running_statistics_are_updated_once(adapter: Adapter) -> None:
    """They are updated once per step, by the ascent pass, at theta, on the whole batch."""
    for gamma in (0.5, 1.0):
        require_statistics_at_theta(adapter, {"rho": 2.0, "beta": 1.0, "gamma": gamma})


def require_statistics_at_theta(adapter: Adapter, esam: Mapping[str, Any]) -> None:
    """Require that the running statistics are those of one forward of each whole batch at theta."""
    dtype, problem = adapter.dtypes[0], batchnorm()
    first, norm = problem.layers[0], problem.layers[1]
    if not (isinstance(first, Dense) and isinstance(norm, BatchNorm)):
        raise TypeError("The problem must start with a dense layer and a BatchNorm.")
    mean, variance, new = norm.mean, norm.variance, norm.momentum
    session = Run(problem=problem, esam=esam, base=Base("sgd", lr=0.0)).on(adapter)
    for i, batch in enumerate(problem.batches[:3]):
        session.step(batch)
        x = batch.inputs @ first.weight
        unbiased = adapter.conventions.unbiased_running_variance
        mean = (1 - new) * mean + new * x.mean(axis=0)
        variance = (1 - new) * variance + new * x.var(axis=0, ddof=int(unbiased))
        found = session.buffers()
        for name, wanted in (("norm.mean", mean), ("norm.variance", variance)):
            require(name in found, f"buffers: {name!r} is missing in {sorted(found)}.")
            where = f"{call_text(esam)}, step {i}: {name}"
            close(where, found[name], wanted, kind="buffers", dtype=dtype)


@check()
def check_batch_statistics_are_those_of_each_pass(adapter: Adapter) -> None:
    """BatchNorm normalises each pass by its own samples: all, then the selected ones."""
    follow(adapter, Run(problem=batchnorm(), esam={"rho": 0.2, "beta": 1.0, "gamma": 0.5}), steps=3)


@check()
def check_one_selected_sample_with_batchnorm(adapter: Adapter) -> None:
    """With k = 1 the descent pass uses the running statistics, since one sample has no others."""
    esam = {"rho": 0.2, "beta": 1.0, "gamma": 0.125}
    follow(adapter, Run(problem=batchnorm(), esam=esam), steps=3)


@check()
def check_a_batch_of_one_sample_with_batchnorm(adapter: Adapter) -> None:
    """Nothing is selected from one sample: BatchNorm normalises by it, as the base optimizer does.

    The running statistics are updated, whichever pass sees the batch first.
    """
    problem = convolution()
    first, *others = problem.batches  # from the first one, a backend may learn what a sample is
    batches = [first, *(subset(batch, np.arange(1)) for batch in others)]
    directions = (Batch(), Part(0.5), Previous()) if shows(adapter, "ascend") else (Batch(),)
    for ascend in directions:
        for gamma in (1.0, 0.5):
            esam = {"rho": 0.2, "beta": 1.0, "gamma": gamma, "ascend": ascend}
            follow(adapter, Run(problem=problem, esam=esam), steps=3, batches=batches)
    base = Run(problem=problem, esam=None).on(adapter)
    ours = Run(problem=problem, esam={"rho": 1e-30, "beta": 1.0, "gamma": 0.5}).on(adapter)
    for i, batch in enumerate(batches[1:]):
        base.step(batch)
        ours.step(batch)
        close_all(
            f"step {i}: weights with a negligible perturbation against the base optimizer's",
            ours.weights(),
            base.weights(),
            kind="weights",
            dtype=adapter.dtypes[0],
        )


@check("losses", "perturbed_losses", "dropout")
def check_selection_pass_sees_the_same_noise(adapter: Adapter) -> None:
    """With a tiny perturbation losses hardly change: dropout is the same in both passes."""
    problem = dropout()
    esam = {"rho": 1e-5, "beta": 1.0, "gamma": 0.5}
    session = Run(problem=problem, esam=esam, base=Base("sgd", lr=0.0)).on(adapter)
    seen = []
    for i in range(3):
        shown = session.step(problem.batches[0])
        seen.append(np.asarray(shown.losses))
        change = float(np.max(np.abs(np.asarray(shown.perturbed_losses) - seen[-1])))
        require(
            change < 1e-3,
            f"step {i}: losses change by {change:.3g} under a perturbation of 1e-5: the passes do "
            "not use the same dropout noise.",
        )
    require(
        float(np.max(np.abs(seen[0] - seen[1]))) > 1e-3,
        "losses: dropout noise is the same in every step; each step must draw its own.",
    )


def _weight_gap(one: Session, other: Session) -> float:
    """Return the largest difference between the weights of two sessions."""
    theirs = other.weights()
    return max(float(np.max(np.abs(w - theirs[n]))) for n, w in one.weights().items())


@check("dropout")
def check_descent_pass_sees_the_same_noise(adapter: Adapter) -> None:
    """With a tiny perturbation and gamma = 1, weights change as with the base optimizer."""
    problem = dropout()
    esam = {"rho": 1e-5, "beta": 1.0, "gamma": 1.0}
    plain = Base("sgd", lr=1.0)
    ours = Run(problem=problem, esam=esam, base=plain, seed=4).on(adapter)
    base = Run(problem=problem, esam=None, base=plain, seed=4).on(adapter)
    for i, batch in enumerate(problem.batches[:2]):
        ours.step(batch)
        base.step(batch)
        gap = _weight_gap(ours, base)
        require(
            gap < 1e-3,
            f"step {i}: weights differ by {gap:.3g} from those of the base optimizer with equal "
            "noise: the descent pass uses different dropout noise than the ascent pass.",
        )


@check("dropout", "indices")
def check_descent_on_some_samples_sees_the_same_noise(adapter: Adapter) -> None:
    """With a tiny perturbation and half of the samples, weights change as in a base step on these.

    The noise is that of a forward pass on these samples with the generators as before the step.
    """
    problem = dropout()
    esam = {"rho": 1e-5, "beta": 1.0, "select": Random(0.5)}
    plain = Base("sgd", lr=1.0)
    for seed in (4, 5):
        ours = Run(problem=problem, esam=esam, base=plain, seed=seed).on(adapter)
        base = Run(problem=problem, esam=None, base=plain, seed=seed).on(adapter)
        batch = problem.batches[0]
        shown = ours.step(batch)
        require(shown.indices is not None, "indices: expected four samples, got None.")
        base.step(subset(batch, np.asarray(shown.indices)))
        gap = _weight_gap(ours, base)
        require(
            gap < 1e-3,
            f"seed {seed}: weights differ by {gap:.3g} from those of a base step on the selected "
            "samples: the descent pass uses different dropout noise.",
        )


@check("dropout", "random")
def check_random_state_after_a_step(adapter: Adapter) -> None:
    """A step advances the framework's random generators like one forward."""
    for gamma in (0.5, 1.0):
        require_random_state_of_a_forward(adapter, {"rho": 0.1, "beta": 0.5, "gamma": gamma})


def require_random_state_of_a_forward(adapter: Adapter, esam: Mapping[str, Any]) -> None:
    """Require that steps advance the random generators like one forward of each whole batch."""
    problem = dropout()
    ours = Run(problem=problem, esam=esam, seed=4).on(adapter)
    base = Run(problem=problem, esam=None, seed=4).on(adapter)
    for i, batch in enumerate(problem.batches):
        before = np.asarray(ours.random_probe())
        ours.step(batch)
        base.step(batch)
        after = np.asarray(ours.random_probe())
        require(
            not np.array_equal(before, after),
            "random_probe: it must change after a step with dropout.",
        )
        where = f"{call_text(esam)}, step {i}: random state"
        equal(where, after, np.asarray(base.random_probe()))


@check()
def check_global_generators_are_left_alone(adapter: Adapter) -> None:
    """Python's and NumPy's global generators are never used or seeded."""
    problem = mlp()
    esam = {"perturb": Sometimes(0.5, Bernoulli(0.5)), "select": Proportional(0.5)}
    session = Run(problem=problem, esam=esam).on(adapter)
    python = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - the tested generator
    for batch in problem.batches[:3]:
        session.step(batch)
    require(random.getstate() == python, "Python's global random generator was changed.")
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    same = np.array_equal(numpy["state"]["key"], after["state"]["key"])
    require(
        same and numpy["state"]["pos"] == after["state"]["pos"],
        "NumPy's global random generator was changed.",
    )


@check()
def check_convolution(adapter: Adapter) -> None:
    """The paper's step on a small convolutional network, in every dtype of the backend."""
    problem: Problem = convolution()
    for dtype in adapter.dtypes:
        run = Run(problem=problem, esam={"rho": 0.1, "beta": 0.6, "gamma": 0.5, "seed": 1})
        follow(adapter, run, steps=3, dtype=dtype)


@check()
def check_the_batch_is_left_alone(adapter: Adapter) -> None:
    """A step does not change the arrays of the batch."""
    problem = mlp()
    session = Run(problem=problem, esam={"rho": 0.3, "beta": 0.5, "gamma": 0.5}).on(adapter)
    for i, batch in enumerate(problem.batches[:2]):
        inputs, targets = batch.inputs.copy(), batch.targets.copy()
        session.step(batch)
        equal(f"step {i}: the inputs of the batch", batch.inputs, inputs)
        equal(f"step {i}: the targets of the batch", batch.targets, targets)


CHECKS = (
    check_running_statistics_are_updated_once,
    check_batch_statistics_are_those_of_each_pass,
    check_one_selected_sample_with_batchnorm,
    check_a_batch_of_one_sample_with_batchnorm,
    check_selection_pass_sees_the_same_noise,
    check_descent_pass_sees_the_same_noise,
    check_descent_on_some_samples_sees_the_same_noise,
    check_random_state_after_a_step,
    check_global_generators_are_left_alone,
    check_the_batch_is_left_alone,
    check_convolution,
)
