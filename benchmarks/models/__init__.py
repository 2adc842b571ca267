"""The networks of the paper, and smaller ones of the same make. Written from the papers' text."""

from benchmarks.models.registry import MODELS, TEXT_MODELS, build

__all__ = ["MODELS", "TEXT_MODELS", "build"]
