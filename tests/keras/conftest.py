"""One Keras backend per process, chosen by KERAS_BACKEND; two devices for JAX."""

import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax":
    flag = "--xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Most of the time is spent on compiling; tests of speed undo this setting.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # Tests train the same small models: compiled functions are shared within this run.
    COMPILED = tempfile.TemporaryDirectory(prefix="esam-keras-jax-")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import warnings  # noqa: E402

import pytest  # noqa: E402

with warnings.catch_warnings():
    # Ignore warnings of the backends during import.
    warnings.simplefilter("ignore")
    import keras

if BACKEND == "torch":
    import torch

    torch.set_num_threads(1)

#: Warnings of Keras or a backend itself, independent of the training.
EXEMPTIONS = (
    # Keras's variables do not support NumPy 2's `copy` yet.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)


def pytest_configure(config):
    config.addinivalue_line("markers", "backends(*names): runs only on these Keras backends")
    for exemption in EXEMPTIONS:
        config.addinivalue_line("filterwarnings", exemption)


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("backends"):
            if BACKEND not in mark.args:
                item.add_marker(pytest.mark.skip(reason=f"of {' and '.join(mark.args)} only"))


@pytest.fixture(autouse=True)
def _same_start():
    keras.utils.set_random_seed(0)
