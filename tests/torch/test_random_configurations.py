"""Random configurations: the fast step equals the reference step."""

import random

import pytest

from esam_core import (
    All,
    Bernoulli,
    Between,
    Every,
    Everything,
    Only,
    Proportional,
    Random,
    RandomSuffix,
    Sometimes,
    Suffix,
    TopIncrease,
    TopLoss,
)
from esam_core.conformance import problems
from esam_core.conformance.trace import Run, follow
from esam_core.problem import Base
from esam_torch.conformance import adapter

PROBLEMS = (problems.mlp, problems.batchnorm, problems.convolution, problems.embedding)


def sampler(rng, names, depth=0):
    """Return a random sampler over these blocks."""
    leaves = [
        lambda: Bernoulli(rng.choice([0.2, 0.5, 0.9, 1.0])),
        Everything,
        lambda: Suffix(rng.choice(names)),
        lambda: RandomSuffix(tuple(rng.sample(names, 2)), (0.25, 0.75)),
    ]
    nests = [
        lambda inner: Only(rng.choice(["weight", "bias", "norm", "*.weight"]), inner),
        lambda inner: Every(2, inner),
        lambda inner: Between(1, rng.choice([2, None]), inner),
        lambda inner: Sometimes(0.6, inner),
    ]
    if depth < 2 and rng.random() < 0.5:
        return rng.choice(nests)(sampler(rng, names, depth + 1))
    return rng.choice(leaves)()


def selector(rng):
    """Return a random selector.

    Proportional(score="increase") is excluded: its weights are ratios of small differences of
    losses, whose rounding errors exceed the kit's tolerances. The kit computes them from the
    reported losses.
    """
    gamma = rng.choice([0.1, 0.25, 0.5, 0.7, 1.0])
    return rng.choice(
        [
            TopIncrease(gamma),
            TopLoss(gamma),
            Random(gamma),
            Proportional(gamma, floor=rng.choice([0.1, 1.0])),
            All(),
        ]
    )


def configuration(seed):
    """Return a random run."""
    rng = random.Random(seed)
    problem = rng.choice(PROBLEMS)()
    layers = [layer for layer in problem.layers if hasattr(layer, "weight")]
    names = [layer.name for layer in layers]
    groups = {}
    for layer in layers:
        if rng.random() < 0.3:
            options = {"rho": rng.choice([0.0, 0.2]), "adaptive": rng.random() < 0.5}
            options["perturb"] = rng.random() < 0.7
            groups[f"{layer.name}.weight"] = options
    frozen = ()
    if rng.random() < 0.2 and len(layers) > 2:
        first = layers[0].name
        frozen = tuple(
            f"{first}.{leaf}"
            for leaf in ("weight", "bias")
            if getattr(layers[0], leaf, None) is not None
        )
        groups.pop(f"{first}.weight", None)
        names = names[1:]
    esam = {
        "rho": rng.choice([0.05, 0.3]),
        "perturb": sampler(rng, names),
        "select": selector(rng),
        "adaptive": rng.random() < 0.3,
        "norm": rng.choice(["masked", "masked", "estimated", "full", "none"]),
        "seed": rng.randrange(2**31),
    }
    base = rng.choice([Base("sgd", lr=0.05, momentum=0.9), Base("sgd", lr=0.05)])
    return Run(problem=problem, esam=esam, base=base, frozen=frozen, groups=groups)


@pytest.mark.filterwarnings("ignore:.*all steps are base steps so far")
@pytest.mark.parametrize("seed", range(120))
def test_against_the_reference(seed):
    follow(adapter, configuration(seed), steps=3)
