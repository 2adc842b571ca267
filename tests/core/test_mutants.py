"""The kit catches faults: each wrong step fails the check named for it."""

import pytest
from tests.core.mutants import MUTANTS

from esam_core.conformance.checks import CHECKS
from esam_core.conformance.compare import ConformanceError
from esam_core.conformance.run import run_check, run_checks


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_is_caught_by_the_check_named_for_it(mutant, dtype):
    adapter = mutant.adapter()
    adapter.dtypes = (dtype,)  # the kit must see the same in a backend with only float32
    result = run_check(adapter, mutant.caught_by)
    assert result.status == "failed", f"{mutant.name} ({mutant.fault}) passes {mutant.caught_by}"
    # A crash does not count: the check itself must detect and describe the fault.
    assert isinstance(result.error, ConformanceError), result.reason
    assert len(result.reason) > 20


def test_every_check_has_a_mutant():
    assert {mutant.caught_by for mutant in MUTANTS} == set(CHECKS)


def test_names_are_unique_and_faults_are_described():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.fault.endswith(".") for mutant in MUTANTS)


def test_plain_sgd_fails_in_many_ways():
    (plain,) = [mutant for mutant in MUTANTS if mutant.name == "PlainSGD"]
    failed = [r.name for r in run_checks(plain.adapter()) if r.status == "failed"]
    assert len(failed) > 20
