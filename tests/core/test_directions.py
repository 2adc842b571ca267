"""Ascent directions: draws, kept gradients and errors; and reference steps, computed by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest

from esam_core import (
    All,
    Batch,
    Bernoulli,
    ESAMConfig,
    ESAMTypeError,
    ESAMValueError,
    Every,
    Everything,
    Momentum,
    NonFiniteError,
    Only,
    Part,
    Previous,
    Proportional,
    Random,
    RandomSuffix,
    StepReport,
    Suffix,
    TopIncrease,
    TopLoss,
    Unit,
)
from esam_core.config import component_from_dict, component_to_dict
from esam_core.conformance import problems
from esam_core.conformance.numpy_adapter import NumpyAdapter
from esam_core.conformance.trace import Run
from esam_core.directions import (
    check_saved_direction,
    check_statistics,
    climbing_indices,
    kept_units,
    records_at_theta,
)
from esam_core.problem import Base
from esam_core.reference.optimizers import BaseOptimizer
from esam_core.selectors import random_indices, subset_size

DIRECTIONS = (Batch(), Part(0.25), Part(1.0), Previous(), Previous(-1), Momentum(), Momentum(1))
UNITS = [Unit(name, (2,), block=name, depth=i) for i, name in enumerate("abc")]


class TestParts:
    @pytest.mark.parametrize("b", [1, 2, 7, 100, 128])
    def test_a_smaller_part_is_a_subset_of_a_larger_one(self, b):
        for count in range(20):
            inner: set = set()
            for percent in range(1, 101):
                part = climbing_indices(Part(percent / 100), b, seed=3, count=count)
                assert len(part) == max(1, -(-percent * b // 100))  # in integers, without rounding
                assert inner <= set(part.tolist())
                assert np.all(np.diff(part) > 0)
                inner = set(part.tolist())
            assert len(inner) == b

    def test_it_draws_the_same_samples_as_random(self):
        for count in range(10):
            part = climbing_indices(Part(0.3), 50, seed=7, count=count)
            drawn = random_indices(50, subset_size(0.3, 50), seed=7, count=count)
            assert part.tolist() == drawn.tolist()

    def test_each_sample_is_drawn_as_often_as_the_share(self):
        n, b = 4000, 8
        hits = np.zeros(b)
        for count in range(n):
            hits[climbing_indices(Part(0.25), b, seed=1, count=count)] += 1
        assert np.all(np.abs(hits / n - 0.25) < 5 * np.sqrt(0.25 * 0.75 / n))

    def test_indices_of_the_other_directions(self):
        assert climbing_indices(Batch(), 3, seed=0, count=0).tolist() == [0, 1, 2]
        for ascend in (Previous(), Momentum()):
            assert len(climbing_indices(ascend, 3, seed=0, count=0)) == 0


@pytest.mark.parametrize(
    ("ascend", "select", "b", "at_theta"),
    [
        (Batch(), TopIncrease(0.5), 8, True),
        (Part(0.5), All(), 8, False),
        (Part(0.5), TopLoss(0.5), 8, False),  # the rest is a separate pass
        (Part(0.5), TopLoss(0.125), 8, True),  # a descent pass on one sample has no statistics
        (Part(0.99), All(), 8, True),  # ceil(7.92) is all
        (Part(0.01), All(), 1, True),
        (Previous(), All(), 8, False),
        (Previous(), TopLoss(0.5), 8, True),
        (Previous(), TopLoss(1.0), 8, False),
        (Momentum(), TopIncrease(0.5), 8, True),
        (Momentum(), Random(0.5), 8, False),
    ],
)
def test_which_pass_updates_the_running_state(ascend, select, b, at_theta):
    assert records_at_theta(ascend, select, b) is at_theta


@pytest.mark.parametrize(
    ("ascend", "select", "b", "accepted"),
    [
        (Batch(), Random(0.5), 2, True),
        (Previous(), Random(0.5), 1, True),  # nothing is selected
        (Previous(), Random(0.5), 2, False),
        (Momentum(), Random(0.5), 2, False),
        (Previous(), Random(0.5), 3, True),
        (Previous(), TopLoss(0.5), 2, True),  # the losses are those of the whole batch
        (Part(0.25), Random(0.125), 8, True),
        (Part(0.125), Random(0.125), 8, False),
        (Part(0.125), TopLoss(0.125), 8, False),
        (Part(0.125), TopLoss(0.25), 8, True),
        (Part(1.0), Random(0.5), 2, True),
    ],
)
def test_which_steps_update_running_statistics(ascend, select, b, accepted):
    if accepted:
        check_statistics(ascend, select, b)
        return
    with pytest.raises(ESAMValueError, match="at least 2 selected") as caught:
        check_statistics(ascend, select, b)
    assert f"Received: select={select!r}, which selects 1 of {b} samples." in str(caught.value)


def test_which_gradients_are_kept():
    def kept(sampler, allowed=(True, True, True), norm="masked"):
        return kept_units(sampler, UNITS, allowed, norm=norm)

    assert kept(Everything()) == (True, True, True)
    assert kept(Suffix("b")) == (False, True, True)
    assert kept(Every(10, Suffix("c"))) == (False, False, True)
    assert kept(RandomSuffix(("c", "b"))) == (False, True, True)
    assert kept(Bernoulli(0.5)) == (True, True, True)
    assert kept(Bernoulli(0.5), allowed=(True, False, True)) == (True, False, True)
    assert kept(Everything(), allowed=(False, True, True)) == (False, True, True)
    assert kept(Only("a")) == (True, False, False)
    assert kept(Suffix("c"), norm="full") == (True, True, True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Part(0.0), ESAMValueError, "`share` must be in (0, 1]. Received: share=0.0."),
        (lambda: Part(1.5), ESAMValueError, "share=1.5"),
        (lambda: Part(float("nan")), ESAMValueError, "share=nan"),
        (lambda: Part("half"), ESAMTypeError, "share='half'"),
        (lambda: Part(True), ESAMTypeError, "share=True"),
        (lambda: Previous(0), ESAMValueError, "`sign` must be 1 or -1. Received: sign=0."),
        (lambda: Previous(2), ESAMValueError, "sign=2"),
        (lambda: Previous(True), ESAMValueError, "sign=True"),
        (lambda: Momentum("-"), ESAMValueError, "sign='-'"),
        (lambda: Momentum(-0.5), ESAMValueError, "sign=-0.5"),
        (lambda: ESAMConfig(ascend=0.25), ESAMTypeError, "`ascend` must be Batch(), Part(share)"),
        (lambda: ESAMConfig(ascend=Previous), ESAMTypeError, "Received: ascend=<class"),
        (lambda: ESAMConfig(ascend="batch"), ESAMTypeError, "ascend='batch'"),
        (lambda: ESAMConfig(ascend=None), ESAMTypeError, "ascend=None"),
        (
            lambda: check_saved_direction({"w": (2, 3)}, {"w": (3, 2)}),
            ESAMValueError,
            "Received: 'w' of shape (2, 3), and the model has shape (3, 2).",
        ),
        (
            lambda: check_saved_direction({"other": (2,)}, {"w": (2,)}),
            ESAMValueError,
            "Received: 'other' of shape (2,), and the model has no such parameter.",
        ),
    ],
)
def test_errors_name_the_requirement_and_the_value(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


class TestConfiguration:
    @pytest.mark.parametrize("ascend", DIRECTIONS, ids=repr)
    def test_round_trip(self, ascend):
        assert component_from_dict(component_to_dict(ascend)) == ascend
        config = ESAMConfig(ascend=ascend)
        assert ESAMConfig.from_dict(config.to_dict()) == config
        assert config.to_dict()["ascend"]["name"] == type(ascend).__name__

    def test_old_checkpoints_have_no_direction(self):
        data = ESAMConfig(rho=0.3).to_dict()
        del data["ascend"]
        assert ESAMConfig.from_dict(data) == ESAMConfig(rho=0.3, ascend=Batch())

    def test_a_sampler_is_not_a_direction(self):
        data = {**ESAMConfig().to_dict(), "ascend": {"name": "Everything"}}
        with pytest.raises(ESAMTypeError, match="`ascend` must be"):
            ESAMConfig.from_dict(data)

    def test_signs_are_integers(self):
        assert component_to_dict(Momentum(-1.0)) == {"name": "Momentum", "sign": -1}


class TestReport:
    def test_a_part(self):
        report = StepReport(count=0, losses=np.array([1.0, 3.0]), part=np.array([2, 5]))
        assert report.loss == 2.0
        assert report.sharpness is None
        assert report.threshold is None

    def test_no_loss_at_theta(self):
        kept = np.array([0, 3])
        report = StepReport(
            count=0, losses=None, perturbed_losses=np.array([1.0, 2.0]), indices=kept
        )
        assert report.loss == report.perturbed_loss == 1.5
        for name in ("sharpness", "selected_sharpness", "rejected_sharpness", "threshold"):
            assert getattr(report, name) is None


def session_of(problem, base=None, **esam):
    return Run(problem=problem, esam=esam, base=base or Base("sgd", lr=0.1, momentum=0.9)).on(
        NumpyAdapter(), "float64"
    )


class TestReference:
    @pytest.mark.parametrize(
        ("select", "ascend", "losses", "perturbed", "part"),
        [
            (All(), Batch(), 8, None, None),
            (All(), Part(0.25), 2, None, 2),
            (TopLoss(0.5), Part(0.25), 8, None, 2),
            (TopIncrease(0.5), Part(0.25), 8, 8, 2),
            (All(), Part(1.0), 8, None, None),
            (All(), Previous(), None, 8, None),
            (Random(0.5), Previous(), None, 4, None),
            (Proportional(0.5), Momentum(), 8, None, None),
            (TopIncrease(0.5), Momentum(), 8, 8, None),
        ],
        ids=str,
    )
    def test_what_a_step_reports(self, select, ascend, losses, perturbed, part):
        problem = problems.mlp()
        session = session_of(problem, beta=1.0, select=select, ascend=ascend)
        session.step(problem.batches[0])
        shown = session.step(problem.batches[1])
        for found, length in (
            (shown.losses, losses),
            (shown.perturbed_losses, perturbed),
            (shown.part, part),
        ):
            assert (None if found is None else len(found)) == length

    def test_losses_are_in_order(self):
        """The losses of the part and of the others together are the losses of the batch."""
        problem = problems.mlp()
        session = session_of(problem, select=TopLoss(0.5), ascend=Part(0.25))
        whole = session_of(problem, select=TopLoss(0.5))
        found = session.step(problem.batches[0]).losses
        np.testing.assert_allclose(found, whole.step(problem.batches[0]).losses, rtol=1e-14)

    def test_a_direction_of_another_model_is_refused(self):
        mlp, softmax = problems.mlp(), problems.softmax()
        saved = session_of(mlp, ascend=Previous())
        saved.step(mlp.batches[0])
        other = session_of(softmax, ascend=Previous())
        with pytest.raises(ESAMValueError, match="must hold gradients of this model's parameters"):
            other.esam.memory.load(saved.state()["direction"])
        assert other.esam.memory.previous == {}

    def test_previous_keeps_perturbable_gradients_and_momentum_keeps_none(self):
        problem = problems.mlp()
        session = session_of(problem, perturb=Suffix("head"), ascend=Previous())
        session.step(problem.batches[0])
        assert set(session.state()["direction"]) == {"head.weight", "head.bias"}
        session = session_of(problem, perturb=Suffix("head"), ascend=Momentum())
        session.step(problem.batches[0])
        assert session.state()["direction"] == {}

    def test_the_gradient_of_the_update_is_kept(self):
        """Neither the gradient of a single `backward` nor a view of it is kept."""
        problem = problems.mlp()
        session = session_of(problem, beta=1.0, gamma=1.0, ascend=Previous())
        for batch in problem.batches[:2]:
            session.backward(batch)
        given = session.gradients()
        session.apply()
        for g in session.left.values():
            g[...] = np.nan  # the caller may change its gradients
        for name, g in session.esam.memory.previous.items():
            np.testing.assert_array_equal(g, given[name])

    def test_a_unit_without_a_gradient_is_not_perturbed(self):
        problem = problems.mlp()
        session = session_of(problem, beta=1.0, gamma=1.0, ascend=Previous())
        session.step(problem.batches[0])
        memory = session.esam.memory
        memory.record_update({n: g for n, g in session.left.items() if n != "head.bias"})
        peaks = []
        session.esam.apply_perturbation = lambda epsilon: peaks.append(epsilon)
        session.step(problem.batches[1])
        names = [unit.name for unit in session.network.units]
        still = {name for name, e in zip(names, peaks[0], strict=True) if not e.any()}
        assert still == {"head.bias"}

    def test_momentum_needs_a_first_moment(self):
        for base in (Base("sgd", lr=0.1), Base("sgd", lr=0.1, nesterov=True)):
            with pytest.raises(ESAMValueError, match=r"`ascend=Momentum\(\)` needs a base"):
                session_of(problems.mlp(), base, ascend=Momentum())
        assert BaseOptimizer(Base("adam")).has_moment
        assert not BaseOptimizer(Base("sgd")).has_moment

    @pytest.mark.parametrize("ascend", [Part(0.5), Previous(), Momentum()], ids=repr)
    def test_nonfinite_values_are_reported(self, ascend):
        problem = problems.mlp()
        session = session_of(problem, gamma=1.0, ascend=ascend, on_nonfinite="raise")
        session.step(problem.batches[0])
        bad = problems.with_nan(problem.batches[1], 0)
        with pytest.raises(NonFiniteError, match="mean loss=nan"):
            session.step(bad)

    def test_an_ascent_on_one_sample_uses_running_statistics(self):
        """Normalised by itself, a single sample and its gradient would be 0."""
        problem = problems.batchnorm()
        session = session_of(problem, beta=1.0, gamma=1.0, ascend=Part(0.125))
        for batch in problem.batches:
            assert session.step(batch).gradient_norm > 1e-3

    def test_batches_of_changing_size(self):
        problem = problems.mlp()
        for ascend in DIRECTIONS:
            session = session_of(problem, gamma=0.5, ascend=ascend)
            for size, batch in zip((8, 3, 1, 2), problem.batches, strict=False):
                small = replace(batch, inputs=batch.inputs[:size], targets=batch.targets[:size])
                shown = session.step(small)
                assert all(np.isfinite(g).all() for g in shown.gradient.values())


@pytest.mark.parametrize("sign", [np.array([1, 2]), "1", True, 2])
def test_other_signs_are_refused(sign):
    with pytest.raises(ESAMValueError, match="`sign` must be 1 or -1"):
        Previous(sign)
