"""The samples of the descent gradient, and their weights."""

import numpy as np

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close, equal
from esam_core.conformance.problems import PEAK_RHO, mlp, numbers, peak, softmax, with_nan
from esam_core.conformance.trace import Run, follow, shows
from esam_core.problem import Base, Batch, Dense, Problem
from esam_core.selectors import (
    All,
    Proportional,
    Random,
    TopIncrease,
    TopLoss,
    inclusion_probabilities,
    random_indices,
    systematic_indices,
    systematic_offset,
)

__all__ = ["CHECKS"]


@check("indices", "losses", "perturbed_losses")
def check_largest_increases_are_selected(adapter: Adapter) -> None:
    """The k samples whose reported losses increase most are selected."""
    problem = mlp()
    session = Run(problem=problem, esam={"rho": 0.3, "beta": 1.0, "gamma": 0.5}).on(adapter)
    for i, batch in enumerate(problem.batches):
        shown = session.step(batch)
        rise = np.asarray(shown.perturbed_losses) - np.asarray(shown.losses)
        expected = np.sort(np.argsort(-rise, kind="stable")[:4])
        equal(f"step {i}: indices", shown.indices, expected)


@check()
def check_descent_is_on_the_selected_samples(adapter: Adapter) -> None:
    """The update uses the mean gradient of the selected samples at theta + epsilon."""
    follow(adapter, Run(problem=mlp(), esam={"rho": 0.3, "beta": 1.0, "gamma": 0.5}), steps=4)


@check("indices")
def check_number_of_selected_samples(adapter: Adapter) -> None:
    """k = max(1, ceil(gamma b)) exactly, despite rounding and ties at the threshold."""
    cases: tuple[tuple[float, int, int], ...] = (
        (0.5, 16, 8),
        (0.5, 7, 4),
        (0.5, 2, 1),
        (0.5, 1, 1),
        (0.3, 8, 3),  # 2.4, which rounds to 2
        (0.29, 100, 29),  # int(100 * 0.29) is 28
        (0.07, 100, 7),  # ceil(0.07 * 100) is 8 in floats
        (0.99, 100, 99),
    )
    for gamma in sorted({case[0] for case in cases}):
        run = Run(problem=softmax(), esam={"rho": 0.1, "beta": 1.0, "gamma": gamma})
        session = run.on(adapter)
        for _, b, k in (case for case in cases if case[0] == gamma):
            shown = session.step(softmax(b).batches[0])
            found = b if shown.indices is None else len(shown.indices)
            equal(f"gamma={gamma}, b={b}: number of selected samples", found, k)


@check("indices")
def check_number_of_samples_of_each_selector(adapter: Adapter) -> None:
    """All selectors select k = ceil(gamma b) samples, despite rounding."""
    for kind in (TopLoss, Random, Proportional):
        for gamma, b, k in ((0.3, 8, 3), (0.07, 100, 7)):
            esam = {"rho": 0.1, "beta": 1.0, "select": kind(gamma)}
            shown = Run(problem=softmax(), esam=esam).on(adapter).step(softmax(b).batches[0])
            found = b if shown.indices is None else len(shown.indices)
            equal(f"{kind(gamma)}, b={b}: number of selected samples", found, k)


@check("indices")
def check_a_nan_is_the_largest_score(adapter: Adapter) -> None:
    """A sample whose loss or increase is NaN is selected, like one that is infinite."""
    run = Run(problem=mlp(), esam={"rho": 0.1, "beta": 1.0, "select": TopLoss(0.125)})
    shown = run.on(adapter).step(with_nan(mlp().batches[0], 7))
    equal("TopLoss, the loss of sample 7 is NaN: indices", shown.indices, [7])
    rho = PEAK_RHO[adapter.dtypes[0]]
    run = Run(problem=peak(), esam={"rho": rho, "beta": 1.0, "select": TopIncrease(0.25)})
    shown = run.on(adapter).step(peak().batches[0])
    equal("TopIncrease, the increase of sample 3 is not finite: indices", shown.indices, [3])


@check("indices")
def check_ties_go_to_the_lower_index(adapter: Adapter) -> None:
    """Equal samples tie exactly: the first k are selected, not none."""
    one = softmax().batches[0]
    layers = softmax().layers
    alike = Batch(np.zeros_like(one.inputs), np.zeros_like(one.targets))
    session = Run(
        problem=Problem("ties", layers, (alike,)),
        esam={"rho": 0.1, "beta": 1.0, "gamma": 0.5},
    ).on(adapter)
    equal("indices among equal samples", session.step(alike).indices, [0, 1, 2, 3])
    many = Batch(np.zeros((40, 5)), np.zeros(40, dtype=np.int64))  # sorting is stable up to 16
    equal("indices among 40 equal samples", session.step(many).indices, list(range(20)))


@check("indices")
def check_larger_scores_precede_ties(adapter: Adapter) -> None:
    """Equal samples fill the places that larger scores leave, wherever these are in the batch.

    Without inputs the bias alone decides: class 1 has the larger loss and the larger increase.
    """
    head = Dense("head", numbers((5, 3), 1.0, 100), np.array([4.0, 0.0, 0.0]))
    for select in (TopIncrease(0.5), TopLoss(0.5)):
        for b, larger in ((8, (5, 7)), (40, (3, 21, 30, 39))):
            targets = np.zeros(b, dtype=np.int64)
            targets[list(larger)] = 1
            batch = Batch(np.zeros((b, 5)), targets)
            run = Run(
                problem=Problem("ties", (head,), (batch,)),
                esam={"rho": 0.1, "beta": 1.0, "select": select},
            )
            ties = [i for i in range(b) if i not in larger][: b // 2 - len(larger)]
            shown = run.on(adapter).step(batch)
            equal(f"{select}, b={b}: indices", shown.indices, sorted((*ties, *larger)))


@check()
def check_batches_of_one_and_two(adapter: Adapter) -> None:
    """Of one sample, it is selected; of two, the sharper one."""
    problem = mlp()
    small = tuple(
        Batch(batch.inputs[:size], batch.targets[:size])
        for batch, size in zip(problem.batches, (1, 2, 2), strict=False)
    )
    follow(
        adapter,
        Run(problem=problem, esam={"rho": 0.3, "beta": 1.0, "gamma": 0.5}),
        steps=3,
        batches=small,
    )


@check()
def check_selectors(adapter: Adapter) -> None:
    """`TopLoss`, `Random` and `All` select the right samples in every step."""
    for selector in (TopLoss(0.5), Random(0.5), All(), TopIncrease(0.25)):
        esam = {"rho": 0.3, "beta": 1.0, "select": selector, "seed": 7}
        follow(adapter, Run(problem=mlp(), esam=esam), steps=3)


@check("indices")
def check_random_selection_is_that_of_the_step(adapter: Adapter) -> None:
    """`Random` draws from (seed, count) on the host: the same samples on every backend.

    A seed may have up to 63 bits.
    """
    problem = mlp()
    for seed in (9, 2**62 + 3):
        esam = {"rho": 0.1, "beta": 1.0, "select": Random(0.5), "seed": seed}
        session = Run(problem=problem, esam=esam).on(adapter)
        for count, batch in enumerate(problem.batches):
            wanted = random_indices(8, 4, seed=seed, count=count)
            equal(f"seed {seed}, step {count}: indices", session.step(batch).indices, wanted)


@check("indices", "sample_weights", "losses", "perturbed_losses")
def check_proportional_selection(adapter: Adapter) -> None:
    """`Proportional` draws exactly k samples by score, with weights 1 / (b pi)."""
    dtype, problem = adapter.dtypes[0], mlp()
    cases = (
        (Proportional(0.5), 7),
        (Proportional(0.5, score="increase", floor=0.5), 7),
        (Proportional(0.5), 2**62 + 3),
    )
    for selector, seed in cases:
        esam = {"rho": 0.3, "beta": 1.0, "select": selector, "seed": seed}
        run = Run(problem=problem, esam=esam)
        session = run.on(adapter)
        for count, batch in enumerate(problem.batches[:3]):
            shown = session.step(batch)
            scores = np.asarray(shown.losses)
            if selector.score == "increase":
                scores = np.asarray(shown.perturbed_losses) - scores
            pi = inclusion_probabilities(scores, 4, selector.floor)
            offset = systematic_offset(seed=seed, count=count)
            indices = systematic_indices(pi, offset)
            equal(f"{selector}, step {count}: indices", shown.indices, indices)
            close(
                f"{selector}, step {count}: sample_weights",
                shown.sample_weights,
                1.0 / (8 * pi[indices]),
                kind="sample weights",
                dtype=dtype,
            )


@check()
def check_sample_weights_enter_the_descent(adapter: Adapter) -> None:
    """`Proportional`: the update uses the weighted gradient, as in the reference."""
    for score in ("loss", "increase"):
        esam = {"rho": 0.3, "beta": 1.0, "select": Proportional(0.5, score=score), "seed": 7}
        follow(adapter, Run(problem=mlp(), esam=esam), steps=3)


@check("passes")
def check_no_pass_is_wasted(adapter: Adapter) -> None:
    """A step evaluates only what it needs: no selection pass if its losses are not used."""
    problem = softmax()
    cases: tuple[tuple[dict[str, object], tuple[int, ...]], ...] = (
        ({"gamma": 0.5}, (8, 8, 4)),
        ({"gamma": 1.0}, (8, 8)),
        ({"gamma": 0.95}, (8, 8)),  # ceil(7.6) is all
        ({"select": All()}, (8, 8)),
        ({"select": TopLoss(0.5)}, (8, 4)),
        ({"select": Random(0.5)}, (8, 4)),
        ({"select": Proportional(0.5)}, (8, 4)),
        ({"select": Proportional(0.5, score="increase")}, (8, 8, 4)),
    )
    for arguments, passes in cases:
        run = Run(
            problem=problem, esam={"rho": 0.1, "beta": 1.0, **arguments}, base=Base("sgd", lr=0.01)
        )
        shown = run.on(adapter).step(problem.batches[0])
        equal(f"{arguments}: samples per pass", shown.passes, passes)
        if len(passes) == 2 and shows(adapter, "perturbed_losses"):
            equal(f"{arguments}: perturbed_losses", shown.perturbed_losses, None)
        if passes == (8, 8) and shows(adapter, "indices"):
            equal(f"{arguments}: indices", shown.indices, None)


CHECKS = (
    check_largest_increases_are_selected,
    check_descent_is_on_the_selected_samples,
    check_number_of_selected_samples,
    check_number_of_samples_of_each_selector,
    check_a_nan_is_the_largest_score,
    check_ties_go_to_the_lower_index,
    check_larger_scores_precede_ties,
    check_batches_of_one_and_two,
    check_selectors,
    check_random_selection_is_that_of_the_step,
    check_proportional_selection,
    check_sample_weights_enter_the_descent,
    check_no_pass_is_wasted,
)
