"""The reference step, checked by hand: limits, then each rule that the paper leaves open."""

import numpy as np
import pytest

from esam_core import (
    ESAMConfig,
    ESAMTypeError,
    ESAMValueError,
    Mask,
    NonFiniteError,
    Unit,
    samplers,
    schedules,
    selectors,
)
from esam_core.conformance import problems
from esam_core.problem import Base, Batch, Conventions, Dense
from esam_core.reference import BaseOptimizer, Network, Step


def mean_gradient(network, batch):
    b = len(batch.targets)
    return network.evaluate(batch).gradient(np.full(b, 1 / b))


def step_of(problem, settings=None, *, seed=0, **arguments):
    network = Network(problem.layers, seed=seed)
    return Step(network, ESAMConfig.from_arguments(**arguments), settings)


class Quadratic:
    """b losses l_i = a_i |theta|^2 / 2 in one unit, which is easy to compute by hand."""

    forward_state = None
    has_statistics = False
    units = (Unit("theta", (2,)),)

    def __init__(self, curvatures):
        self.buffers = {}
        self.parameters = {"theta": np.array([3.0, 4.0])}
        self.curvatures = np.asarray(curvatures)

    def evaluate(self, batch, *, statistics, update):
        theta, a = self.parameters["theta"], batch.inputs
        evaluation = type("Evaluation", (), {})()
        evaluation.losses = a * np.sum(theta**2) / 2
        evaluation.gradient = lambda weights: {"theta": np.sum(weights * a) * theta}
        return evaluation


def test_a_quadratic_by_hand():
    """|theta| = 5, epsilon = theta / 5, so |theta + eps| = 6; k = 1 selects the steepest sample."""
    model = Quadratic([1.0, 3.0])
    batch = Batch(model.curvatures, np.zeros(2, int))
    step = Step(model, ESAMConfig.from_arguments(rho=1.0, beta=1.0, gamma=0.5))
    gradient, report = step.backward(batch)
    assert report.losses.tolist() == [12.5, 37.5]
    assert report.gradient_norm == pytest.approx(2.0 * 5.0)
    assert report.perturbation_norm == pytest.approx(1.0)
    assert report.perturbed_losses == pytest.approx(np.array([18.0, 54.0]))
    assert report.indices.tolist() == [1]
    assert report.sharpness == pytest.approx((5.5 + 16.5) / 2)
    assert gradient["theta"] == pytest.approx(3.0 * 1.2 * np.array([3.0, 4.0]))
    assert model.parameters["theta"].tolist() == [3.0, 4.0]


def test_rho_zero_is_the_base_gradient():
    problem = problems.batchnorm()
    step = step_of(problem, rho=0.0, gamma=0.5)
    gradient, report = step.backward(problem.batches[0])
    expected = mean_gradient(Network(problem.layers), problem.batches[0])
    assert all(np.array_equal(gradient[name], g) for name, g in expected.items())
    assert report.perturbed == ()
    assert report.sample_share == 1.0


def test_an_empty_mask_is_the_base_gradient():
    problem = problems.mlp()
    step = step_of(problem, rho=1.0, perturb=schedules.Every(2), gamma=0.5)
    step.backward(problem.batches[0])
    gradient, report = step.backward(problem.batches[1])
    expected = mean_gradient(Network(problem.layers), problem.batches[1])
    assert all(np.array_equal(gradient[name], g) for name, g in expected.items())
    assert (report.count, report.perturbation_norm, report.gradient_norm) == (1, 0.0, None)


def test_everything_is_sam():
    problem = problems.mlp()
    batch, rho = problem.batches[0], 0.4
    gradient, report = step_of(problem, rho=rho, beta=1.0, gamma=1.0).backward(batch)
    network = Network(problem.layers)
    g = mean_gradient(network, batch)
    length = np.sqrt(sum(np.sum(a**2) for a in g.values()))
    for name, a in g.items():
        network.parameters[name] += rho * a / length
    expected = mean_gradient(network, batch)
    assert all(gradient[name] == pytest.approx(a) for name, a in expected.items())
    assert report.indices is None
    assert report.perturbed_losses is None


def test_the_descent_gradient_is_that_of_the_selected_samples():
    problem = problems.mlp()
    batch = problem.batches[0]
    step = step_of(problem, rho=0.4, beta=1.0, gamma=0.5)
    gradient, report = step.backward(batch)
    network = Network(problem.layers)
    g = mean_gradient(network, batch)
    length = np.sqrt(sum(np.sum(a**2) for a in g.values()))
    for name, a in g.items():
        network.parameters[name] += 0.4 * a / length
    peak = network.evaluate(batch)
    assert report.perturbed_losses == pytest.approx(peak.losses)
    weights = np.zeros(8)
    weights[np.argsort(-(peak.losses - report.losses))[:4]] = 0.25
    expected = peak.gradient(weights)
    assert all(gradient[name] == pytest.approx(a) for name, a in expected.items())


def test_theta_is_restored_bit_for_bit_in_the_same_arrays():
    problem = problems.convolution()
    step = step_of(problem, rho=3.0, beta=0.5)
    arrays = dict(step.model.parameters)
    before = {name: a.copy() for name, a in arrays.items()}
    for batch in problem.batches:
        step.backward(batch)
    assert all(step.model.parameters[name] is a for name, a in arrays.items())
    assert all(np.array_equal(a, before[name]) for name, a in arrays.items())


def test_one_selected_sample_is_normalised_by_running_statistics():
    """By its own statistics it would be only the bias, with a zero gradient before BatchNorm."""
    problem = problems.batchnorm()
    gradient, report = step_of(problem, rho=0.1, beta=1.0, gamma=0.125).backward(problem.batches[0])
    assert len(report.indices) == 1
    assert np.abs(gradient["first.weight"]).max() > 1e-3


def test_distribution_of_masks_of_single_weights():
    layer = Dense("big", np.ones((50, 40)) / 50)
    network = Network([layer])
    batch = Batch(np.ones((4, 50)), np.array([0, 1, 2, 3]))
    step = Step(
        network,
        ESAMConfig.from_arguments(
            rho=0.1, perturb=samplers.Bernoulli(0.3, unit="weight"), gamma=1.0
        ),
    )
    shares = [step.backward(batch)[1].weight_share for _ in range(20)]
    assert len(set(shares)) > 10
    assert abs(np.mean(shares) - 0.3) < 5 * np.sqrt(0.21 / 2000 / 20)


def test_weight_share_counts_perturbable_weights():
    problem = problems.mlp()
    settings = {"head.weight": {"perturb": False}, "head.bias": {"perturb": False}}
    step = step_of(problem, settings, rho=0.1, perturb=samplers.Suffix("second"))
    _, report = step.backward(problem.batches[0])
    assert report.perturbed == ("second.weight", "second.bias")
    assert report.weight_share == pytest.approx((35 + 5) / (42 + 7 + 35 + 5))


def test_own_settings_of_parameters():
    problem = problems.mlp()
    settings = {"head.weight": {"rho": 0.0}, "first.weight": {"rho": 0.2, "adaptive": True}}
    step = step_of(problem, settings, rho=0.1, beta=1.0)
    assert step.rho == [0.2, 0.1, 0.1, 0.1, 0.0, 0.1]
    assert step.adaptive == [True] + [False] * 5
    _, report = step.backward(problem.batches[0])
    assert "head.weight" not in report.perturbed


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"head.wieght": {"rho": 1.0}}, ESAMValueError, "Received: settings='head.wieght'"),
        ({"head.weight": {"roh": 1.0}}, ESAMValueError, "must be one of 'rho', 'adaptive', 'pert"),
        ({"head.weight": {"rho": np.nan}}, ESAMValueError, "`rho` must be a finite number >= 0"),
        ({"head.weight": {"perturb": "False"}}, ESAMTypeError, "Received: perturb='False'"),
        ({"head.weight": {"adaptive": 1}}, ESAMTypeError, "`adaptive` must be True or False"),
    ],
)
def test_invalid_settings_of_parameters_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        step_of(problems.mlp(), settings)


class TestNonFinite:
    problem = problems.batchnorm()
    bad = problems.with_nan(problem.batches[0], 5)

    def test_propagate(self):
        for select in (
            selectors.TopIncrease(0.5),
            selectors.TopLoss(0.25),
            selectors.Random(0.125),
            selectors.All(),
        ):
            step = step_of(problems.mlp(), rho=0.1, beta=1.0, select=select)
            batch = problems.with_nan(problems.mlp().batches[0], 5)
            gradient, report = step.backward(batch)
            assert all(np.isnan(g).all() for g in gradient.values())
            assert report.perturbation_norm == 0.0

    @pytest.mark.parametrize("score", ["loss", "increase"])
    def test_propagate_through_a_random_selection(self, score):
        select = selectors.Proportional(0.25, score=score)
        gradient, _ = step_of(self.problem, rho=0.1, beta=1.0, select=select).backward(self.bad)
        assert all(np.isnan(g).any() for g in gradient.values())

    def test_skip(self):
        step = step_of(self.problem, rho=0.1, beta=0.5, on_nonfinite="skip")
        before = {name: a.copy() for name, a in step.model.buffers.items()}
        gradient, report = step.backward(self.bad)
        assert gradient == {}
        assert report.skipped
        assert step.count == 1
        assert all(np.array_equal(a, before[n]) for n, a in step.model.buffers.items())

    def test_raise(self):
        step = step_of(self.problem, rho=0.1, beta=0.5, on_nonfinite="raise")
        before = {name: a.copy() for name, a in step.model.buffers.items()}
        with pytest.raises(NonFiniteError, match=r"not finite.*on_nonfinite='raise'"):
            step.backward(self.bad)
        assert step.count == 0
        assert all(np.array_equal(a, before[n]) for n, a in step.model.buffers.items())

    def test_overflow_at_the_peak(self):
        step = step_of(problems.mlp(), rho=1e308, beta=0.5, seed=3)
        before = {name: a.copy() for name, a in step.model.parameters.items()}
        gradient, report = step.backward(problems.mlp().batches[0])
        assert not np.isfinite(report.perturbed_losses).all()
        assert any(not np.isfinite(g).all() for g in gradient.values())
        assert all(np.array_equal(a, before[n]) for n, a in step.model.parameters.items())

    def test_a_descent_gradient_alone_is_not_finite(self):
        """With gamma = 1 there are no losses at the peak: the gradient is the only sign."""
        problem = problems.mlp()
        for mode in ("skip", "raise"):
            step = step_of(problem, rho=1e308, beta=0.5, gamma=1.0, seed=3, on_nonfinite=mode)
            if mode == "skip":
                gradient, report = step.backward(problem.batches[0])
                assert gradient == {} and report.skipped and np.isfinite(report.losses).all()
            else:
                with pytest.raises(NonFiniteError):
                    step.backward(problem.batches[0])


def test_an_empty_batch_is_refused():
    step = step_of(problems.mlp())
    with pytest.raises(ESAMValueError, match="must not be empty"):
        step.backward(Batch(np.zeros((0, 6)), np.zeros(0, int)))
    assert step.count == 0


class TestBaseOptimizers:
    """Two updates computed by hand, from theta = 1 with gradients .5 and .25."""

    def run(self, base, conventions=None):
        theta = {"w": np.array([1.0])}
        optimizer = BaseOptimizer(base, conventions)
        for g in (0.5, 0.25):
            optimizer.update(theta, {"w": np.array([g])})
        return float(theta["w"][0])

    def test_unknown_kinds_are_refused(self):
        with pytest.raises(ESAMValueError, match=r"`kind` must be one of 'sgd', .* kind='adamax'"):
            Base("adamax")

    def test_sgd(self):
        assert self.run(Base("sgd", lr=0.1)) == pytest.approx(1 - 0.05 - 0.025)

    def test_momentum(self):
        # v = .5, then .9 * .5 + .25 = .7
        assert self.run(Base("sgd", lr=0.1, momentum=0.9)) == pytest.approx(1 - 0.05 - 0.07)

    def test_nesterov(self):
        # .5 + .9 * .5 = .95, then .25 + .9 * .7 = .88
        base = Base("sgd", lr=0.1, momentum=0.9, nesterov=True)
        assert self.run(base) == pytest.approx(1 - 0.095 - 0.088)

    def test_weight_decay_in_the_gradient(self):
        # g = .5 + .1 = .6: .94; then .25 + .094 = .344
        assert self.run(Base("sgd", lr=0.1, weight_decay=0.1)) == pytest.approx(0.94 - 0.0344)

    def test_decoupled_weight_decay(self):
        base = Base("sgd", lr=0.1, momentum=0.9, weight_decay=0.1)
        first = 1 * 0.99 - 0.05
        keras = Conventions(decoupled_sgd_decay=True)
        assert self.run(base, keras) == pytest.approx(first * 0.99 - 0.07)

    def test_adam_starts_with_the_sign(self):
        theta = {"w": np.array([1.0, 1.0])}
        BaseOptimizer(Base("adam", lr=0.1)).update(theta, {"w": np.array([1e-3, -7.0])})
        assert theta["w"] == pytest.approx([0.9, 1.1], rel=1e-5)

    def test_adam_by_hand(self):
        m, v = 0.1 * 0.5 * 0.9 + 0.1 * 0.25, 0.001 * 0.25 * 0.999 + 0.001 * 0.0625
        second = 0.1 * (m / 0.19) / (np.sqrt(v / (1 - 0.999**2)) + 1e-8)
        assert self.run(Base("adam", lr=0.1)) == pytest.approx(0.9 - second, rel=1e-6)

    def test_adamw_decays_separately_from_the_gradient(self):
        theta = {"w": np.array([2.0])}
        base = Base("adamw", lr=0.1, weight_decay=0.5)
        BaseOptimizer(base).update(theta, {"w": np.array([3.0])})
        assert theta["w"] == pytest.approx([2.0 * 0.95 - 0.1])

    def test_where_adam_adds_its_eps(self):
        """torch: sqrt(v_hat) + eps. Keras: (sqrt(v) + eps), then corrected."""
        theta = {"w": np.array([0.0])}
        base = Base("adam", lr=1.0, eps=1.0)
        BaseOptimizer(base).update(theta, {"w": np.array([1.0])})
        assert theta["w"] == pytest.approx([-1.0 / (1.0 + 1.0)])
        theta = {"w": np.array([0.0])}
        keras = Conventions(adam_eps_in_corrected_root=False)
        BaseOptimizer(base, keras).update(theta, {"w": np.array([1.0])})
        root = np.sqrt(0.001)
        assert theta["w"] == pytest.approx([-root / (root + 1.0)])

    def test_parameters_without_a_gradient_stay(self):
        theta = {"w": np.array([1.0]), "unused": np.array([1.0])}
        base = Base("sgd", lr=0.1, momentum=0.9, weight_decay=0.1)
        BaseOptimizer(base).update(theta, {"w": np.array([1.0])})
        assert theta["unused"].tolist() == [1.0]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("norm", ["masked", "estimated", "full", "none"])
@pytest.mark.parametrize("beta", [2.0**-23, 5e-324])
def test_masks_that_hit_no_single_weight_perturb_nothing(beta, norm, dtype):
    """This includes 1 / beta = inf, which a custom sampler may have."""

    class Rare:
        needs_blocks = False

        def draw(self, units, *, seed, count, stream=0):
            return Mask((True,) * len(units), (beta,) * len(units), beta, 1)

        def masks(self, units):
            return None

    problem = problems.mlp()
    network = Network(problem.layers, dtype=dtype)
    step = Step(network, ESAMConfig.from_arguments(perturb=Rare(), gamma=1.0, norm=norm))
    expected = mean_gradient(network, problem.batches[0])
    gradient, report = step.backward(problem.batches[0])
    assert report.weight_share == report.perturbation_norm == 0.0
    for name, array in gradient.items():
        assert np.array_equal(array, expected[name]), name
