"""The conformance kit on esam-torch."""

import re
from pathlib import Path

import pytest
from tests.torch.devices import needs_cuda

import esam_torch.conformance
from esam_core.conformance.testing import conformance
from esam_torch.conformance import TorchAdapter, adapter


@conformance(adapter)
def test_cpu(run):
    run()


@pytest.mark.gpu
@needs_cuda
@conformance(TorchAdapter("cuda"))
def test_cuda(run):
    run()


def test_no_gaps_are_declared():
    assert not adapter.gaps
    assert adapter.dtypes == ("float64", "float32")


def test_the_adapter_uses_what_every_user_has():
    text = Path(esam_torch.conformance.__file__).read_text("utf-8")
    assert re.findall(r"\besam\._\w+", text) == []
