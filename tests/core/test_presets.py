"""The published settings can be used directly."""

import pytest

from esam_core import ESAMConfig, Proportional, Suffix, Unit
from esam_core.cost import expected_cost
from esam_core.presets import PRESETS


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


def test_half_of_the_work_costs_less_than_the_papers():
    paper = ESAMConfig.from_arguments(**PRESETS["cifar-resnet18"].arguments())
    units = [Unit(f"{i}", (1,), cost=1.0, block=f"b{i}", depth=i) for i in range(8)]
    half = expected_cost(Suffix(0.5), units, Proportional(0.5)).ratio
    # A forward, the backward of four layers, and a base step on half of the samples; the first
    # layer of each backward needs no input gradient.
    assert half == pytest.approx((8 + (4 + 3) + (8 + 8 + 7) / 2) / (8 + 8 + 7))
    assert half < 0.75 * expected_cost(paper.perturb, units, paper.select).ratio
