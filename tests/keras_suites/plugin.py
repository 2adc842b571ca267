"""A pytest plugin that runs Keras's own tests with ESAM at rho = 0 around each optimizer.

`compile` gets `ESAM(optimizer, rho=0)`, and a loss scaler wraps one. Without `--esam` the tests are
unchanged. The outcome of each test is written to a file.
"""

import contextlib
import functools
import inspect
import json
import sys
import types
from pathlib import Path

import keras
import pytest

from esam_keras import ESAM
from esam_keras.handover import applying
from esam_keras.optimizer import find_esam

#: The number of optimizers that were wrapped, and the number of ESAM's steps.
USED = {"optimizers": 0, "steps": 0}


def skip_if_backend(name, reason):
    """Return a mark that skips a test on one backend."""
    return pytest.mark.skipif(keras.backend.backend() == name, reason=reason)


# Some of Keras's tests import this from the `conftest` of Keras's repository.
sys.modules.setdefault("conftest", types.SimpleNamespace(skip_if_backend=skip_if_backend))


def pytest_addoption(parser):
    parser.addoption("--esam", action="store_true", help="put ESAM around the optimizers")
    parser.addoption("--outcomes", required=True, help="where to write the outcome of each test")


def pytest_configure(config):
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: of Keras's")
    if config.getoption("--esam"):
        wrap_optimizers()
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


def with_esam(optimizer):
    """Return ESAM around an optimizer, given as `compile` accepts it."""
    optimizer = keras.optimizers.get(optimizer)
    if optimizer is None or find_esam(optimizer) is not None:
        return optimizer
    USED["optimizers"] += 1
    return ESAM(optimizer, rho=0.0, gamma=1.0, logs=False)


def wrap_optimizers():
    """Let `compile` and loss scalers wrap the given optimizers in ESAM."""
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    scaler = keras.optimizers.LossScaleOptimizer
    compile_, init, keep_report = owner.compile, scaler.__init__, ESAM.keep_report
    signature = inspect.signature(compile_)

    @functools.wraps(compile_)
    def compile_with_esam(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        bound.arguments["optimizer"] = with_esam(bound.arguments["optimizer"])
        return compile_(*bound.args, **bound.kwargs)

    @functools.wraps(init)
    def init_with_esam(self, inner_optimizer, *args, **kwargs):
        init(self, with_esam(inner_optimizer), *args, **kwargs)

    def counted(self, report):
        USED["steps"] += 1
        keep_report(self, report)

    owner.compile, scaler.__init__, ESAM.keep_report = compile_with_esam, init_with_esam, counted


@pytest.fixture(autouse=True)
def _gradients_of_a_step(request):
    """Accept the gradients of the loss scaler's tests, which run steps without a model."""
    alone = "loss_scale_optimizer_test" in request.node.nodeid
    with applying() if alone else contextlib.nullcontext():
        yield


class Outcomes:
    """Collects the outcome of each test, and its cause."""

    def __init__(self, path):
        self.path = Path(path)
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid[report.nodeid.index("keras/src/") :]
            crash = getattr(report.longrepr, "reprcrash", None) if report.failed else None
            self.found[name] = (report.outcome, getattr(crash, "message", ""))

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps({"outcomes": self.found, "used": USED}), "utf-8")
