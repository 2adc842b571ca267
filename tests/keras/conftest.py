"""One Keras backend a process, chosen by KERAS_BACKEND; two devices for JAX to distribute over."""

import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax":
    flag = "--xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Compiling takes the time here; what is proved of speed switches this off again.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # Tests train the same small models: what one has compiled the others read, for this run.
    COMPILED = tempfile.TemporaryDirectory(prefix="esam-keras-jax-")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import warnings  # noqa: E402

import pytest  # noqa: E402

with warnings.catch_warnings():
    # What the backends warn of while they are imported is theirs.
    warnings.simplefilter("ignore")
    import keras

if BACKEND == "torch":
    import torch

    torch.set_num_threads(1)

#: Warnings that Keras or a backend gives of itself, whatever is trained with it.
EXEMPTIONS = (
    # Keras's variables do not know NumPy 2's `copy` yet.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)


def pytest_configure(config):
    config.addinivalue_line("markers", "backends(*names): runs on these Keras backends only")
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
