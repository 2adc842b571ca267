"""Devices on which tests run."""

import pytest
import torch
from tests.torch.scene import batch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def cuda(*values):
    """Return parameters of a test: "cuda" and these values."""
    return pytest.param("cuda", *values, marks=[pytest.mark.gpu, needs_cuda])


devices = pytest.mark.parametrize("device", ["cpu", cuda()])


def on(device, b=8, seed=1):
    return tuple(t.to(device) for t in batch(b, seed))
