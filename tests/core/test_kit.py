"""The parts of the kit: comparisons that can fail, runner, declared gaps, pytest decorator."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tests.core.mutants.passes import PlainSGD

from esam_core import ESAMValueError
from esam_core.conformance import problems
from esam_core.conformance.__main__ import load_adapter, main
from esam_core.conformance.adapter import CAPABILITIES
from esam_core.conformance.checks import CHECKS, check, missing, needs_of
from esam_core.conformance.compare import (
    ConformanceError,
    close,
    close_all,
    equal,
    equal_all,
    has_nonfinite,
)
from esam_core.conformance.numpy_adapter import NumpyAdapter
from esam_core.conformance.run import check_adapter, run_check, run_checks
from esam_core.conformance.testing import conformance
from esam_core.conformance.tolerances import TOLERANCES, tolerance
from esam_core.conformance.trace import Run
from esam_core.reference import Network
from esam_core.selectors import Proportional, TopIncrease

ADDRESS = "esam_core.conformance.numpy_adapter:adapter"
ONES = np.ones(3)


class TestComparisons:
    def test_close(self):
        close("x", ONES, ONES * (1 + 1e-15), kind="losses", dtype="float64")
        close("x", 1.0, 1.0, kind="norms", dtype="float32")

    @pytest.mark.parametrize(
        ("actual", "message"),
        [
            (ONES * (1 + 1e-12), "the error is 1e-12"),
            (np.array([1.0, np.nan, 1.0]), "at (1,)"),
            (np.array([1.0, np.inf, 1.0]), "the error is inf"),
            (np.ones((3, 1)), "expected shape (3,), got (3, 1)"),
            (np.ones(1), "got (1,)"),  # would broadcast
            (np.ones(3, np.float32), "expected dtype float64, got float32"),
            (np.ones(3, int), "got int64"),
            (None, "got None"),
            (["a", "b", None], "expected numbers"),
        ],
    )
    def test_close_fails(self, actual, message):
        with pytest.raises(ConformanceError) as caught:
            close("the losses", actual, ONES, kind="losses", dtype="float64")
        assert message in str(caught.value)
        assert str(caught.value).startswith("the losses: ")

    def test_tolerances_are_relative_to_the_largest_entry(self):
        big = np.array([1e6, 1.0])
        close("x", np.array([1e6, 1.0 + 1e-9]), big, kind="losses", dtype="float64")
        with pytest.raises(ConformanceError):
            close("x", big[1:] + 1e-9, big[1:], kind="losses", dtype="float64")

    def test_an_expectation_of_zero_is_exact(self):
        with pytest.raises(ConformanceError):
            close("x", np.array([1e-300]), np.zeros(1), kind="losses", dtype="float64")

    def test_names(self):
        with pytest.raises(ConformanceError, match=r"missing \['b'\], unexpected \['c'\]"):
            close_all("w", {"a": ONES, "c": ONES}, {"a": ONES, "b": ONES}, kind="same", dtype="x")

    def test_equal(self):
        equal("i", np.array([1, 2]), [1, 2])
        equal("i", None, None)
        for actual, expected in (([1], [1, 2]), ([1, 3], [1, 2]), (None, [1]), ([1], None)):
            with pytest.raises(ConformanceError):
                equal("i", actual, expected)

    def test_equal_all_is_bit_for_bit(self):
        equal_all("w", {"a": ONES}, {"a": ONES.copy()})
        for other in (np.nextafter(ONES, 2.0), ONES.astype(np.float32), np.ones((3, 1))):
            with pytest.raises(ConformanceError):
                equal_all("w", {"a": other}, {"a": ONES})
        with pytest.raises(ConformanceError):
            equal_all("w", {"a": np.array([-0.0])}, {"a": np.array([0.0])})

    @pytest.mark.parametrize(
        ("actual", "message"),
        [
            ({"w": [1.0, 1.0, 1.0]}, "x 'w': expected a NumPy array, got list."),
            (None, "x: expected arrays by name, got NoneType."),
            ([ONES], "x: expected arrays by name, got list."),
        ],
    )
    def test_equal_all_names_other_types(self, actual, message):
        with pytest.raises(ConformanceError, match=re.escape(message)):
            equal_all("x", actual, {"w": ONES})

    def test_indices_are_integers(self):
        equal("x", np.array([0, 2], np.uint8), np.array([0, 2]))
        with pytest.raises(ConformanceError, match=r"x: expected integers, got \[0.0, 2.0\]"):
            equal("x", np.array([0.0, 2.0]), np.array([0, 2]))

    def test_has_nonfinite(self):
        found = has_nonfinite({"a": ONES, "b": np.array([np.inf]), "c": np.array([np.nan])})
        assert found == {"a": False, "b": True, "c": True}

    def test_it_is_an_assertion_error(self):
        assert issubclass(ConformanceError, AssertionError)


def test_the_tolerance_table_gives_reasons():
    for row in TOLERANCES.values():
        assert len(row.reason) > 20
        assert 1 < row.float32 < 10_000
        assert 1 < row.float64 < 10_000
    assert tolerance("losses", "float32") < 1e-5


class TestChecks:
    def test_each_has_a_description(self):
        for name, function in CHECKS.items():
            assert name.startswith("check_")
            assert function.__doc__
            assert set(needs_of(function)) <= set(CAPABILITIES)

    def test_unknown_needs_are_refused(self):
        with pytest.raises(ValueError, match="must be capabilities"):
            check("telepathy")

    def test_each_capability_is_needed_by_some_check(self):
        """Except for two, which make other checks stricter."""
        needed = {need for function in CHECKS.values() for need in needs_of(function)}
        assert set(CAPABILITIES) - needed == {"gradient"}

    def test_they_can_be_called_directly(self):
        CHECKS["check_everything_is_sam"](NumpyAdapter())
        with pytest.raises(ConformanceError):
            CHECKS["check_everything_is_sam"](NumpyAdapter(step=PlainSGD))


class TestGaps:
    @staticmethod
    def with_gaps(**gaps):
        adapter = NumpyAdapter()
        adapter.gaps = gaps
        return adapter

    def test_of_a_capability(self):
        adapter = self.with_gaps(faults="compiled", random="hidden")
        result = run_check(adapter, "check_a_failed_step_leaves_no_trace")
        assert (result.status, result.reason) == ("gap", "faults: compiled")
        assert missing(CHECKS["check_random_state_after_a_step"], adapter) == ("random",)

    def test_of_a_check(self):
        adapter = NumpyAdapter(step=PlainSGD)
        adapter.gaps = {"check_everything_is_sam": "it is not"}
        result = run_check(adapter, "check_everything_is_sam")
        assert (result.status, result.reason) == ("gap", "it is not")

    def test_a_closed_gap_may_not_stay_declared(self):
        adapter = self.with_gaps(check_everything_is_sam="it is not")
        result = run_check(adapter, "check_everything_is_sam")
        assert result.status == "failed"
        assert "declared a gap: it is not" in result.reason

    def test_a_backend_that_shows_only_weights(self):
        """Such a backend is still checked: a wrong one fails."""
        hidden = [
            *("losses", "perturbed_losses", "indices", "sample_weights", "perturbed"),
            *("perturbation_norm", "gradient_norm", "gradient", "passes", "backward", "faults"),
            *("state", "random", "groups", "frozen", "weight_masks"),
        ]
        adapter = self.with_gaps(**dict.fromkeys(hidden, "not shown"))
        statuses = [result.status for result in run_checks(adapter)]
        assert statuses.count("failed") == 0
        assert statuses.count("passed") > 20
        adapter = NumpyAdapter(step=PlainSGD)
        adapter.gaps = dict.fromkeys(hidden, "not shown")
        assert [r.status for r in run_checks(adapter)].count("failed") > 15

    def test_unknown_gaps_are_refused(self):
        with pytest.raises(ESAMValueError, match="must name capabilities"):
            check_adapter(self.with_gaps(colour="none"))

    def test_gaps_need_reasons(self):
        with pytest.raises(ESAMValueError, match="must give a reason"):
            check_adapter(self.with_gaps(faults=""))
        adapter = NumpyAdapter()
        adapter.gaps = ["faults"]
        with pytest.raises(ESAMValueError, match=r"dictionary of reasons.*Received: \['faults'\]"):
            check_adapter(adapter)

    @pytest.mark.parametrize("dtypes", [(), "float32", ("bfloat16",), ["float32"]])
    def test_unknown_dtypes_are_refused(self, dtypes):
        adapter = NumpyAdapter()
        adapter.dtypes = dtypes
        with pytest.raises(ESAMValueError, match="`dtypes` must be a tuple of one or both of"):
            list(run_checks(adapter))


class TestRunner:
    def test_passes(self, capsys):
        assert main([ADDRESS]) == 0
        output = capsys.readouterr().out
        assert f"{len(CHECKS)} passed, 0 failed, 0 declared gaps" in output
        assert all(name in output for name in CHECKS)

    def test_fails(self, capsys):
        assert main([f"{__name__}:broken", "-q", "-k", "sam"]) == 1
        output = capsys.readouterr().out
        assert "FAILED  check_everything_is_sam" in output
        assert "weights against SAM's" in output

    def test_lists_gaps_with_their_reasons(self, capsys):
        assert main([f"{__name__}:gapped", "-k", "failed_step"]) == 0
        output = capsys.readouterr().out
        assert "gap     check_a_failed_step_leaves_no_trace" in output
        assert "faults: compiled" in output

    def test_a_method_that_is_missing_is_named(self):
        class Incomplete(NumpyAdapter):
            def session(self, *arguments, **others):
                whole = super().session(*arguments, **others)
                return SimpleNamespace(step=whole.step, weights=whole.weights)

        result = run_check(Incomplete(), "check_backward_adds_the_descent_gradient")
        assert result.reason.startswith("the session has no `zero_gradients`: implement it, or")

    def test_no_session_is_named(self):
        class Forgetful(NumpyAdapter):
            def session(self, *args, **options):
                super().session(*args, **options)

        result = run_check(Forgetful(), "check_suffix")
        assert result.reason == "session: expected a session, got None."

    def test_unknown_checks_are_refused(self):
        with pytest.raises(ESAMValueError, match=r"names of checks.*Received: check_nothing\."):
            list(run_checks(NumpyAdapter(), ["check_suffix", "check_nothing"]))

    def test_an_error_of_the_backend_is_a_failure_with_its_place(self):
        class Crashing(NumpyAdapter):
            def session(self, *arguments, **others):
                raise KeyError("weights")

        result = run_check(Crashing(), "check_everything_is_sam")
        assert result.status == "failed"
        assert "KeyError: 'weights'" in result.reason
        assert "test_kit.py" in result.reason

    @pytest.mark.parametrize(
        "address",
        ["nonsense", "no_such_module:adapter", "esam_core:no_such_name", ":a", "a:", "..a:b"],
    )
    def test_wrong_addresses(self, address, capsys):
        assert main([address]) == 2
        assert address in capsys.readouterr().err

    @pytest.mark.parametrize(
        "address",
        [
            "math:pi",
            "math:sqrt",
            "esam_core:Bernoulli",
            "esam_core:Suffix",
            "esam_core.conformance.numpy_adapter:NumpySession",
        ],
    )
    def test_an_object_that_is_not_an_adapter(self, address, capsys):
        assert main([address]) == 2
        said = capsys.readouterr().err
        assert "The adapter must be an object with name, dtypes, conventions, gaps, session" in said
        assert f"Received: {address!r}" in said

    def test_no_such_check(self, capsys):
        assert main([ADDRESS, "-k", "no_such_check"]) == 2
        assert "no_such_check" in capsys.readouterr().err

    def test_a_class_is_called(self):
        assert load_adapter("esam_core.conformance.numpy_adapter:NumpyAdapter").name

    def test_as_a_process_without_pytest(self):
        """The kit and the runner import neither pytest nor any framework."""
        code = (
            "import sys; from esam_core.conformance.__main__ import main; "
            f"status = main(['{ADDRESS}', '-q']); "
            "bad = {'pytest', 'torch', 'keras', 'tensorflow', 'jax'} & set(sys.modules); "
            "sys.exit(3 if bad else status)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert found.returncode == 0, found.stdout


def broken():
    return NumpyAdapter(step=PlainSGD)


def gapped():
    adapter = NumpyAdapter()
    adapter.gaps = {"faults": "compiled"}
    return adapter


@conformance(gapped())
def test_the_decorator(run):
    run()


class TestDecorator:
    @staticmethod
    def cases(adapter):
        def function(run):
            run()

        (mark,) = conformance(adapter)(function).pytestmark
        return {case.id: case.values[0] for case in mark.args[1]}

    def test_there_is_one_test_per_check(self):
        assert list(self.cases(NumpyAdapter())) == list(CHECKS)

    def test_gaps_are_skipped_with_their_reasons(self):
        with pytest.raises(pytest.skip.Exception, match="declared gap: faults: compiled"):
            self.cases(gapped())["check_a_failed_step_leaves_no_trace"]()

    def test_failures_fail(self):
        with pytest.raises(ConformanceError, match="against SAM's"):
            self.cases(broken())["check_everything_is_sam"]()


class TestProblems:
    """Masks and indices are compared exactly, which requires margins far above rounding."""

    ALL = (
        problems.softmax(),
        problems.mlp(),
        problems.batchnorm(),
        problems.convolution(),
        problems.embedding(),
    )

    @pytest.mark.parametrize("problem", ALL, ids=lambda problem: problem.name)
    def test_float32_starts_from_the_same_numbers(self, problem):
        for array in Network(problem.layers).parameters.values():
            assert np.array_equal(array.astype(np.float32).astype(np.float64), array)
            assert np.abs(array).max() < 4
        for batch in problem.batches:
            assert np.array_equal(batch.inputs.astype(np.float32), batch.inputs)

    @pytest.mark.parametrize("rho", [0.05, 0.1, 0.3])
    @pytest.mark.parametrize("problem", ALL, ids=lambda problem: problem.name)
    def test_selections_have_margins(self, problem, rho):
        for beta, seed in ((1.0, 0), (0.5, 3), (0.6, 0)):
            esam = {"rho": rho, "beta": beta, "gamma": 0.5, "seed": seed}
            session = Run(problem=problem, esam=esam).on(NumpyAdapter(), "float64")
            for batch in problem.batches:
                shown = session.step(batch)
                if shown.perturbed_losses is None:
                    continue
                rise = np.sort(shown.perturbed_losses - shown.losses)
                margin = (rise[4] - rise[3]) / np.abs(shown.perturbed_losses).max()
                assert margin > 100 * np.finfo(np.float32).eps

    @pytest.mark.parametrize("selector", [Proportional(0.5), Proportional(0.5, "increase", 0.5)])
    def test_proportional_draws_have_margins(self, selector):
        from esam_core.selectors import inclusion_probabilities, systematic_offset

        esam = {"rho": 0.3, "beta": 1.0, "select": selector, "seed": 7}
        session = Run(problem=problems.mlp(), esam=esam).on(NumpyAdapter(), "float64")
        for count, batch in enumerate(problems.mlp().batches[:3]):
            shown = session.step(batch)
            scores = shown.losses
            if selector.score == "increase":
                scores = shown.perturbed_losses - shown.losses
            ends = np.cumsum(inclusion_probabilities(scores, 4, selector.floor))
            points = systematic_offset(seed=7, count=count) + np.arange(4)
            assert np.abs(ends[:, None] - points).min() > 1e-4

    def test_selectors_by_loss_have_margins_too(self):
        session = Run(problem=problems.mlp(), esam={"select": TopIncrease(0.25)}).on(
            NumpyAdapter(), "float64"
        )
        for batch in problems.mlp().batches:
            losses = np.sort(session.step(batch).losses)
            assert losses[4] - losses[3] > 1e-4

    def test_the_problems_have_not_changed(self):
        """A digest of all numbers, on which the golden traces depend."""
        arrays = [batch.inputs for p in self.ALL for batch in p.batches]
        arrays += [a for p in self.ALL for a in Network(p.layers).parameters.values()]
        total = sum(float(np.sum(np.abs(array))) for array in arrays)
        assert total == 2602.1142578125
