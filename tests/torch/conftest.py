"""Fixtures that several files use."""

import pytest


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return module
