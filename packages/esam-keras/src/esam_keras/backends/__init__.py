"""Keras's backends, each an implementation of the protocol in `esam_keras.backends.base`."""

import importlib

import keras

from esam_keras.backends.base import Backend

__all__ = ["Backend", "current_backend"]


def current_backend() -> Backend:
    """Return Keras's current backend."""
    module = importlib.import_module(f"esam_keras.backends.{keras.backend.backend()}")
    backend: Backend = module.BACKEND
    return backend
