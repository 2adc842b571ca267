"""`ascend=Momentum()`: the base optimizer's first moment as the ascent direction."""

from typing import Any

from esam_core.conformance.adapter import Adapter
from esam_core.conformance.by_hand import mean_gradient, peak_gradient
from esam_core.conformance.checks.registry import check
from esam_core.conformance.compare import close_all, require
from esam_core.conformance.problems import mlp, softmax
from esam_core.conformance.trace import Run, follow, same_state
from esam_core.directions import Momentum, Previous
from esam_core.problem import Base
from esam_core.reference.network import Network

__all__ = ["CHECKS"]


@check("ascend")
def check_climb_along_the_momentum(adapter: Adapter) -> None:
    """`Momentum()` perturbs against the base optimizer's first moment after the last update."""
    dtype, problem, rho, lr, mu = adapter.dtypes[0], mlp(), 0.3, 0.1, 0.9
    for sign in (-1, 1):
        esam = {
            "rho": rho,
            "beta": 1.0,
            "gamma": 1.0,
            "ascend": Momentum(sign),
            "norm_eps": 1e-30,
        }
        run = Run(problem=problem, esam=esam, base=Base("sgd", lr=lr, momentum=mu))
        session, network = run.on(adapter), Network(problem.layers)
        theta = network.parameters
        v: dict[str, Any] = {}
        for i, batch in enumerate(problem.batches[:4]):
            session.step(batch)
            if v:
                g = peak_gradient(network, batch, v, sign * rho)
                v = {name: mu * v[name] + g[name] for name in theta}
            else:
                v = mean_gradient(network, batch)
            for name in theta:
                theta[name] -= lr * v[name]
            close_all(
                f"Momentum({sign}), step {i}: weights",
                session.weights(),
                theta,
                kind="weights",
                dtype=dtype,
            )


@check("ascend")
def check_momentum_of_each_base(adapter: Adapter) -> None:
    """The first moments of SGD's variants, Adam and AdamW match the reference."""
    bases = (
        (Base("sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01), "weights"),
        (Base("adam", lr=0.01), "adaptive weights"),
        (Base("adamw", lr=0.01, weight_decay=0.1), "adaptive weights"),
    )
    for base, kind in bases:
        esam = {"rho": 0.3, "beta": 0.5, "gamma": 1.0, "ascend": Momentum(), "seed": 3}
        follow(adapter, Run(problem=mlp(), esam=esam, base=base), steps=4, kind=kind)


@check("ascend")
def check_momentum_without_a_past_is_previous(adapter: Adapter) -> None:
    """`Momentum` equals `Previous` if the moment is the last gradient (Adam, beta_1 = 0)."""
    problem, base = mlp(), Base("adam", lr=0.01, betas=(0.0, 0.999))
    for sign in (1, -1):
        esam = {"rho": 0.3, "beta": 0.5, "gamma": 0.5, "seed": 3}
        one = Run(problem=problem, esam={**esam, "ascend": Momentum(sign)}, base=base).on(adapter)
        other = Run(problem=problem, esam={**esam, "ascend": Previous(sign)}, base=base).on(adapter)
        for i, batch in enumerate(problem.batches[:4]):
            one.step(batch)
            other.step(batch)
            same_state(
                f"sign {sign}, step {i}, with Momentum against Previous",
                one,
                other,
                adapter.dtypes[0],
            )


@check("ascend")
def check_a_base_without_a_first_moment_is_refused(adapter: Adapter) -> None:
    """`Momentum` with SGD without momentum immediately raises a ValueError that names `ascend`."""
    raised: Exception | None = None
    esam = {"rho": 0.1, "ascend": Momentum()}
    try:
        Run(problem=softmax(), esam=esam, base=Base("sgd", lr=0.1)).on(adapter)
    except Exception as error:  # the type is checked below
        raised = error
    require(
        isinstance(raised, ValueError) and "ascend" in str(raised),
        f"Momentum without momentum: expected a ValueError that names `ascend`, got {raised!r}.",
    )


CHECKS = (
    check_climb_along_the_momentum,
    check_momentum_of_each_base,
    check_momentum_without_a_past_is_previous,
    check_a_base_without_a_first_moment_is_refused,
)
