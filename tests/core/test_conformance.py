"""The kit on the reference: all checks pass, with all conventions, without gaps."""

import pytest

from esam_core.conformance.numpy_adapter import NumpyAdapter, adapter
from esam_core.conformance.testing import conformance
from esam_core.problem import Conventions


@conformance(adapter)
def test_torch_conventions(run):
    run()


@conformance(NumpyAdapter(Conventions(False, True, False)))
def test_keras_conventions(run):
    run()


def test_the_reference_declares_no_gaps():
    assert not adapter.gaps
    assert adapter.dtypes == ("float64", "float32")


@pytest.mark.parametrize("dtypes", [("float32",)])
def test_a_backend_with_only_float32(dtypes):
    single = NumpyAdapter()
    single.dtypes = dtypes
    from esam_core.conformance.run import run_checks

    failed = [(r.name, r.reason) for r in run_checks(single) if r.status != "passed"]
    assert not failed
