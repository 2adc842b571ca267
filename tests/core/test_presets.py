"""The published settings can be used directly."""

import pytest

from esam_core import ESAMConfig, Everything, Unit
from esam_core.cost import expected_cost
from esam_core.presets import PRESETS, RECOMMENDED, recommended_arguments


@pytest.mark.parametrize("name", PRESETS)
def test_arguments_make_a_configuration(name):
    preset = PRESETS[name]
    config = ESAMConfig.from_arguments(**preset.arguments())
    assert config.rho == preset.rho
    assert config.perturb.beta == preset.beta
    assert config.select.gamma == preset.gamma


def test_published_values():
    published = {name: (p.rho, p.beta, p.gamma) for name, p in PRESETS.items()}
    assert published["cifar-resnet18"] == (0.05, 0.6, 0.5)
    assert published["cifar-wrn28-10"] == (0.1, 0.5, 0.5)
    assert published["cifar-pyramidnet110"] == (0.2, 0.6, 0.5)
    assert published["imagenet-resnet50"][1:] == (0.6, 0.7)
    assert published["imagenet-resnet101"][1:] == (0.6, 0.7)
    assert published["imagenet-vit-s16"][1:] == (0.5, 0.7)
    assert [name for name, p in PRESETS.items() if p.rho_is_ours] == ["imagenet-vit-s16"]


def test_sources_of_values():
    assert all(p.source for p in PRESETS.values())
    assert "ours" in PRESETS["imagenet-vit-s16"].source
    assert "beta=0.5" in PRESETS["cifar-pyramidnet110"].source


def test_the_recommended_is_a_configuration_and_costs_less_than_the_papers():
    config = ESAMConfig.from_arguments(rho=0.05, **RECOMMENDED)
    paper = ESAMConfig.from_arguments(**PRESETS["cifar-resnet18"].arguments())
    units = [Unit(f"{i}", (1,), cost=1.0, block=f"b{i}", depth=i) for i in range(8)]
    ours, theirs = (expected_cost(c.perturb, units, c.select).ratio for c in (config, paper))
    # A forward, the backward of four layers, and a base step on half of the samples; the first
    # layer of each backward needs no input gradient.
    assert ours == pytest.approx((8 + (4 + 3) + (8 + 8 + 7) / 2) / (8 + 8 + 7))
    assert ours < 0.75 * theirs


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {**RECOMMENDED}),
        ({"rho": 0.1}, {**RECOMMENDED, "rho": 0.1}),
        ({"beta": 0.6}, {"select": RECOMMENDED["select"], "beta": 0.6}),
        ({"gamma": 1.0}, {"perturb": RECOMMENDED["perturb"], "gamma": 1.0}),
        ({"budget": 1.2}, {"budget": 1.2}),
        ({"gamma": None}, {**RECOMMENDED, "gamma": None}),
        ({"perturb": Everything()}, {**RECOMMENDED, "perturb": Everything()}),
    ],
)
def test_recommended_arguments(overrides, expected):
    assert recommended_arguments(**overrides) == expected
    assert set(RECOMMENDED) == {"perturb", "select"}  # the constant is not changed
