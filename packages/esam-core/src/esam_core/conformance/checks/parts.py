"""`ascend=Part(share)`: the ascent direction from a part of the batch."""

from typing import Any

import numpy as np

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.by_hand import mean_gradient, peak_gradient
from esam_core.conformance.checks.passes import (
    require_random_state_of_a_forward,
    require_statistics_at_theta,
)
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close_all, equal, equal_all, require
from esam_core.conformance.problems import batchnorm, mlp, softmax
from esam_core.conformance.trace import Run, follow, same_state
from esam_core.directions import Batch, Momentum, Part, Previous
from esam_core.problem import Base
from esam_core.reference.network import Network
from esam_core.reference.step import subset
from esam_core.samplers import Bernoulli, Suffix
from esam_core.selectors import (
    All,
    Proportional,
    Random,
    TopIncrease,
    TopLoss,
    random_indices,
    subset_size,
)

__all__ = ["CHECKS"]


@check("ascend")
def check_climb_along_a_part(adapter: Adapter) -> None:
    """`Part(share)` is SAM with an ascent pass on some samples, computed here from gradients.

    The part is that of (seed, count), with the same draws as `Random`.
    """
    dtype, problem, rho, lr = adapter.dtypes[0], mlp(), 0.3, 0.1
    for share, seed in ((0.25, 5), (0.5, 5), (0.01, 5), (0.5, 2**62 + 3)):
        esam = {
            "rho": rho,
            "beta": 1.0,
            "gamma": 1.0,
            "ascend": Part(share),
            "seed": seed,
            "norm_eps": 1e-30,
        }
        session = Run(problem=problem, esam=esam, base=Base("sgd", lr=lr)).on(adapter)
        network = Network(problem.layers)
        theta = network.parameters
        for i, batch in enumerate(problem.batches[:3]):
            shown = session.step(batch)
            n = subset_size(share, 8)
            part = random_indices(8, n, seed=seed, count=i)
            where = f"Part({share}), step {i}"
            equal(f"{where}: part", shown.part, part)
            ascent = mean_gradient(network, subset(batch, part))
            for name, g in peak_gradient(network, batch, ascent, rho).items():
                theta[name] -= lr * g
            close_all(f"{where}: weights", session.weights(), theta, kind="weights", dtype=dtype)


@check("ascend")
def check_size_of_a_part(adapter: Adapter) -> None:
    """The part has max(1, ceil(share b)) samples exactly, despite rounding."""
    for share, b, n in ((0.3, 8, 3), (0.01, 8, 1), (0.29, 100, 29), (0.07, 100, 7)):
        esam = {"rho": 0.1, "beta": 1.0, "gamma": 1.0, "ascend": Part(share)}
        shown = Run(problem=softmax(), esam=esam).on(adapter).step(softmax(b).batches[0])
        found = b if shown.part is None else len(shown.part)
        equal(f"Part({share}), b={b}: number of samples in the part", found, n)


@check("ascend", "indices")
def check_smaller_parts_lie_within_larger_ones(adapter: Adapter) -> None:
    """`Part(.25)` is a subset of `Part(.5)`, which has the samples of `Random(.5)`."""
    problem = softmax()
    base = Base("sgd", lr=0.01)

    def run(share: float) -> Any:
        esam = {"rho": 0.1, "ascend": Part(share), "select": Random(0.5), "beta": 1.0, "seed": 2}
        return Run(problem=problem, esam=esam, base=base).on(adapter)

    small, large = run(0.25), run(0.5)
    drawn = []
    for i, batch in enumerate(problem.batches):
        few, many = small.step(batch), large.step(batch)
        equal(f"step {i}: size of Part(0.25)", len(few.part), 2)
        inside = set(np.asarray(few.part).tolist()) <= set(np.asarray(many.part).tolist())
        require(inside, f"step {i}: Part(0.25) is {few.part}, and Part(0.5) is {many.part}.")
        equal(f"step {i}: Part(0.5) against Random(0.5)", many.part, many.indices)
        drawn.append(tuple(np.asarray(few.part).tolist()))
    require(len(set(drawn)) > 1, f"part: {drawn[0]} in every step; each step must draw its own.")


@check("ascend")
def check_part_of_everything_is_the_batch(adapter: Adapter) -> None:
    """`Part(1.0)` is `Batch()`: weights, running statistics, and a batch of one sample."""
    for problem, size in ((batchnorm(), 8), (softmax(), 1)):
        esam = {"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3}
        part = Run(problem=problem, esam={**esam, "ascend": Part(1.0)}).on(adapter)
        whole = Run(problem=problem, esam={**esam, "ascend": Batch()}).on(adapter)
        for i, batch in enumerate(problem.batches[:3]):
            small = subset(batch, np.arange(size))
            shown = part.step(small)
            whole.step(small)
            equal(f"step {i}: part", shown.part, None)
            same_state(
                f"{problem.name}, step {i}, with Part(1.0) against Batch()",
                part,
                whole,
                adapter.dtypes[0],
            )


@check("ascend")
def check_parts_with_every_selector(adapter: Adapter) -> None:
    """Samplers, selectors, norms and BatchNorm with a part match the reference.

    A selector by loss also needs the losses of the other samples, from a forward without a graph.
    """
    cases: tuple[dict[str, Any], ...] = (
        {"beta": 0.5, "select": All()},
        {"beta": 1.0, "select": TopLoss(0.5)},
        {"perturb": Suffix("norm"), "select": TopIncrease(0.5)},
        {"beta": 0.5, "select": Random(0.5), "norm": "estimated"},
        {"beta": 0.5, "select": Proportional(0.5), "norm": "full"},
        {"perturb": Bernoulli(0.5), "select": TopIncrease(0.25), "norm": "none"},
        {"beta": 1.0, "select": All(), "adaptive": True},
        # One sample in the descent pass: it uses the running statistics.
        {"beta": 1.0, "select": TopLoss(0.125)},
    )
    for case in cases:
        for share in (0.5, 0.125):
            if share == 0.125 and case["select"] == TopLoss(0.125):
                continue  # no pass would update the running statistics
            esam = {"rho": 0.2, "ascend": Part(share), "seed": 3, **case}
            follow(adapter, Run(problem=batchnorm(), esam=esam), steps=3)


@check("ascend")
def check_statistics_with_a_part(adapter: Adapter) -> None:
    """If the ascent pass sees a part, only the descent pass updates the running statistics.

    With a negligible perturbation they are then those of the whole batch at theta.
    """
    esam = {"rho": 1e-30, "beta": 1.0, "gamma": 1.0, "ascend": Part(0.5)}
    require_statistics_at_theta(adapter, esam)


@check("ascend")
def check_constant_statistics_are_refused(adapter: Adapter) -> None:
    """One sample in the descent pass, and no pass at theta on more: BatchNorm would learn nothing.

    A ValueError that names the selector changes nothing. Without BatchNorm it is no problem.
    """
    cases: tuple[tuple[Any, Any], ...] = (
        (Previous(), Random(0.125)),
        (Momentum(), Random(0.125)),
        (Part(0.125), Random(0.125)),
        (Part(0.125), TopLoss(0.125)),
    )
    for ascend, select in cases:
        esam = {"rho": 0.2, "beta": 1.0, "ascend": ascend, "select": select}
        first, second = batchnorm().batches[:2]
        session = Run(problem=batchnorm(), esam=esam).on(adapter)
        if not isinstance(ascend, Part):
            session.step(first)  # the first step is a base step
        weights, buffers = session.weights(), session.buffers()
        raised: Exception | None = None
        try:
            session.step(second)
        except Exception as error:  # its type is checked below
            raised = error
        where = f"{ascend}, {select}"
        named = isinstance(raised, ValueError) and repr(select) in str(raised)
        require(named, f"{where}: expected a ValueError with {select!r}, got {raised!r}.")
        equal_all(f"{where}: weights", session.weights(), weights)
        equal_all(f"{where}: buffers", session.buffers(), buffers)
        follow(adapter, Run(problem=mlp(), esam=esam), steps=2)


@check("ascend", "passes")
def check_passes_with_a_part(adapter: Adapter) -> None:
    """The part is evaluated separately; other samples only if the selector needs them."""
    problem = softmax()
    cases: tuple[tuple[Any, float, tuple[int, ...]], ...] = (
        (All(), 0.25, (2, 8)),
        (Random(0.5), 0.25, (2, 4)),
        (TopLoss(0.5), 0.25, (2, 6, 4)),
        (Proportional(0.5), 0.5, (4, 4, 4)),
        (TopIncrease(0.5), 0.25, (2, 6, 8, 4)),
        (TopIncrease(1.0), 0.25, (2, 8)),
    )
    for select, share, passes in cases:
        esam = {"rho": 0.1, "beta": 1.0, "select": select, "ascend": Part(share)}
        run = Run(problem=problem, esam=esam, base=Base("sgd", lr=0.01))
        shown = run.on(adapter).step(problem.batches[0])
        equal(f"Part({share}), {select}: samples per pass", shown.passes, passes)


@check("ascend", "dropout", "random")
def check_random_state_with_a_part(adapter: Adapter) -> None:
    """With `Part`, random generators advance as in one forward of the whole batch."""
    esam = {"rho": 0.1, "beta": 1.0, "gamma": 1.0, "ascend": Part(0.25)}
    require_random_state_of_a_forward(adapter, esam)


CHECKS = (
    check_climb_along_a_part,
    check_size_of_a_part,
    check_smaller_parts_lie_within_larger_ones,
    check_part_of_everything_is_the_batch,
    check_parts_with_every_selector,
    check_statistics_with_a_part,
    check_constant_statistics_are_refused,
    check_passes_with_a_part,
    check_random_state_with_a_part,
)
