"""Fixtures that several files use, and exact float32 on a GPU."""

import os

import pytest

# The libraries read it when they start. TF32 has 10 bits, which is not what the tests compare.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return module
