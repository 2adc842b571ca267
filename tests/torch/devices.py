"""Devices on which tests run."""

import pytest
import torch
from tests.torch.scene import batch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


devices = pytest.mark.parametrize("device", DEVICES)


def on(device, b=8, seed=1):
    return tuple(t.to(device) for t in batch(b, seed))
