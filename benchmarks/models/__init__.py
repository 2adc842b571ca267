"""The networks of the paper and smaller variants, written from the text of the papers."""

from benchmarks.models.registry import MODELS, TEXT_MODELS, build

__all__ = ["MODELS", "TEXT_MODELS", "build"]
