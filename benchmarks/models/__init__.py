"""The networks of the paper, and smaller ones of the same make. Written from the papers' text."""

from benchmarks.models.registry import MODELS, build

__all__ = ["MODELS", "build"]
