"""The networks have the published number of parameters, and run."""

import pytest
import torch
from benchmarks.models import MODELS, TEXT_MODELS, build

# Published counts: (millions, within); counts without CIFAR classes are for 10 classes.
PUBLISHED = {
    "resnet18": (11.17, 0.005, 10),
    "resnet20": (0.27, 0.005, 10),
    "wrn28-10": (36.5, 0.05, 10),
    "wrn16-4": (2.7, 0.06, 10),
    "pyramidnet110": (28.5, 0.05, 10),
    "resnet50": (25.557, 0.0005, 1000),
    "resnet101": (44.549, 0.0005, 1000),
    "vit-s16": (22.05, 0.005, 1000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    millions, within, classes = PUBLISHED[name]
    with torch.device("meta"):
        model = build(name, classes=classes, size=224 if name == "vit-s16" else 32)
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert counted == pytest.approx(millions, abs=within)


@pytest.mark.parametrize("name", MODELS)
def test_forward_gives_one_row_of_logits_per_sample(name: str) -> None:
    size = {"resnet50": 64, "resnet101": 64, "vit-s16": 32}.get(name, 16)
    narrow = {
        "wrn28-10": 1,
        "wrn16-4": 1,
        "pyramidnet110": 12,
        "vit-small-cifar": 12,
        "vit-s16": 24,
    }
    model = build(name, classes=7, size=size, width=narrow.get(name, 4))
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", [*MODELS, *TEXT_MODELS])
def test_the_named_blocks_exist(name: str) -> None:
    with torch.device("meta"):
        model = build(name, classes=10)
    names = dict(model.named_modules())
    described = (MODELS | TEXT_MODELS)[name]
    assert described.late in names
    assert described.last in names


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_text_model_is_causal_with_logits_at_every_position(name: str) -> None:
    model = build(name, classes=7, size=16, width=8).eval()
    x = torch.randint(7, (2, 16))
    logits = model(x)
    assert logits.shape == (2, 7, 16)
    later = x.clone()
    later[:, 9] = (x[:, 9] + 1) % 7
    changed = (model(later) != logits).any(dim=(0, 1))
    assert not changed[:9].any()
    assert changed[9:].all()


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"must be one of resnet18, .* Received: 'resnet19'"):
        build("resnet19", classes=10)
