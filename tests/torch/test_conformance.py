"""The conformance kit on esam-torch."""

import pytest
import torch

from esam_core.conformance.testing import conformance
from esam_torch.conformance import TorchAdapter, adapter


@conformance(adapter)
def test_cpu(run):
    run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@conformance(TorchAdapter("cuda"))
def test_cuda(run):
    run()


def test_no_gaps_are_declared():
    assert not adapter.gaps
    assert adapter.dtypes == ("float64", "float32")
