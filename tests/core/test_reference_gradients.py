"""The hand-written derivatives, compared with finite differences for each layer and problem."""

import numpy as np
import pytest

from esam_core.conformance import problems
from esam_core.problem import Batch
from esam_core.reference import Network, layers

GENERATOR = np.random.Generator(np.random.PCG64(7))


def normal(*shape):
    return GENERATOR.normal(size=shape)


def numerical(function, x, h=1e-6):
    """Return the derivative of a scalar function of an array, by central differences."""
    found = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        kept = x[place]
        x[place] = kept + h
        above = function()
        x[place] = kept - h
        below = function()
        x[place] = kept
        found[place] = (above - below) / (2 * h)
    return found


X2, X4 = normal(5, 3), normal(3, 5, 4, 2)
W = {
    "dense": (normal(3, 4), normal(4)),
    "conv": (normal(2, 3, 2, 3), normal(3)),
    "norm2": (normal(3), normal(3)),
    "norm4": (normal(2), normal(2)),
    "table": (normal(6, 3),),
}
INTEGERS = np.array([[0, 5, 5], [2, 0, 1]])
NOISE = GENERATOR.random((5, 3))
#: name -> (input, parameters, function that returns output and backward)
CASES = {
    "dense": (X2, W["dense"], lambda: layers.dense(X2, *W["dense"])),
    "dense without bias": (X2, W["dense"][:1], lambda: layers.dense(X2, W["dense"][0], None)),
    "conv": (X4, W["conv"], lambda: layers.conv(X4, *W["conv"])),
    "conv without bias": (X4, W["conv"][:1], lambda: layers.conv(X4, W["conv"][0], None)),
    "batchnorm": (X2, W["norm2"], lambda: layers.batchnorm(X2, *W["norm2"], 1e-3)[:2]),
    "batchnorm of images": (X4, W["norm4"], lambda: layers.batchnorm(X4, *W["norm4"], 1e-3)[:2]),
    "batchnorm by running statistics": (
        X2,
        W["norm2"],
        lambda: layers.batchnorm_running(
            X2, *W["norm2"], np.array([0.1, -0.2, 0.3]), np.array([1.0, 2.0, 0.5]), 1e-3
        ),
    ),
    "dropout": (X2, (), lambda: layers.dropout(X2, 0.4, NOISE)),
    "tanh": (X2, (), lambda: layers.tanh(X2)),
    "relu": (X2, (), lambda: layers.relu(X2)),
    "global mean": (X4, (), lambda: layers.global_mean(X4)),
}


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    x, parameters, function = CASES[name]
    y, backward = function()
    direction = normal(*y.shape)

    def value():
        return float(np.sum(function()[0] * direction))

    dx, gradients = backward(direction)
    assert dx == pytest.approx(numerical(value, x), abs=2e-7, rel=1e-6)
    assert list(gradients) == ["weight", "bias"][: len(parameters)]
    for theta, g in zip(parameters, gradients.values(), strict=True):
        assert g.shape == theta.shape
        assert g == pytest.approx(numerical(value, theta), abs=2e-7, rel=1e-6)


def test_embedding_adds_up_repeated_entries():
    (table,) = W["table"]
    y, backward = layers.embedding(INTEGERS, table)
    assert y.shape == (2, 3, 3)
    direction = normal(2, 3, 3)
    gradient = backward(direction)[1]["weight"]
    assert gradient[5] == pytest.approx(direction[0, 1] + direction[0, 2])
    assert not gradient[3].any()


def test_softmax_cross_entropy():
    logits, targets, weights = normal(4, 3), np.array([0, 2, 1, 1]), normal(4)

    def value():
        return float(weights @ layers.softmax_cross_entropy(logits, targets)[0])

    losses, backward = layers.softmax_cross_entropy(logits, targets)
    assert losses == pytest.approx(
        [np.log(np.exp(z).sum()) - z[y] for z, y in zip(logits, targets, strict=True)]
    )
    assert backward(weights) == pytest.approx(numerical(value, logits), abs=1e-8)


def test_softmax_cross_entropy_of_large_logits():
    losses, backward = layers.softmax_cross_entropy(np.array([[1e4, 0.0]]), np.array([1]))
    assert losses.tolist() == [1e4]
    assert backward(np.ones(1)).tolist() == [[1.0, -1.0]]


def test_convolution_by_hand():
    x = np.arange(9.0).reshape(1, 3, 3, 1)
    weight = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    y, _ = layers.conv(x, weight, np.array([0.5]))
    assert y[0, :, :, 0].tolist() == [[27.5, 37.5], [57.5, 67.5]]


def test_batchnorm_by_hand():
    x = np.array([[1.0], [3.0]])
    y, _, mean, variance = layers.batchnorm(x, np.array([2.0]), np.array([1.0]), 0.0)
    assert y.tolist() == [[-1.0], [3.0]]
    assert (mean.tolist(), variance.tolist()) == ([2.0], [1.0])


PROBLEMS = {
    "softmax": problems.softmax(),
    "mlp": problems.mlp(),
    "batchnorm": problems.batchnorm(),
    "convolution": problems.convolution(),
    "embedding": problems.embedding(),
    "dropout": problems.dropout(),
    "carry": problems.carry(),
}


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_whole_problems(name, statistics):
    problem = PROBLEMS[name]
    network, batch = Network(problem.layers), problem.batches[0]
    weights = np.linspace(0.5, 1.5, len(batch.targets))
    state = network.forward_state

    def losses():
        network.forward_state = state  # the same noise and carried state each time
        return network.evaluate(batch, statistics=statistics)

    gradient = losses().gradient(weights)
    assert list(gradient) == list(network.parameters)
    for parameter, theta in network.parameters.items():
        expected = numerical(lambda: float(weights @ losses().losses), theta)
        assert gradient[parameter] == pytest.approx(expected, abs=1e-6, rel=1e-5), parameter


def test_frozen_parameters_have_no_unit_and_no_gradient():
    problem = problems.mlp()
    network = Network(problem.layers, frozen=("second.weight", "second.bias"))
    names = ["first.weight", "first.bias", "head.weight", "head.bias"]
    assert [unit.name for unit in network.units] == names
    assert list(network.evaluate(problem.batches[0]).gradient(np.ones(8))) == names


def test_units():
    units = {unit.name: unit for unit in Network(problems.convolution().layers).units}
    assert units["stem.weight"].shape == (3, 3, 2, 3)
    assert units["stem_norm.bias"].kind == "norm"
    assert units["body.weight"].kind == "weight"
    assert units["head.bias"].kind == "bias"
    assert units["head.bias"].block == "head"
    assert units["stem.weight"].depth < units["body.weight"].depth < units["head.weight"].depth
    (table, *_) = Network(problems.embedding().layers).units
    assert table.kind == "embedding"


def test_running_statistics_by_hand():
    problem = problems.batchnorm()
    for unbiased in (True, False):
        network = Network(problem.layers, unbiased_running_variance=unbiased)
        before = {name: a.copy() for name, a in network.buffers.items()}
        x = problem.batches[0].inputs @ network.parameters["first.weight"]
        network.evaluate(problem.batches[0], update=False)
        assert np.array_equal(network.buffers["norm.mean"], before["norm.mean"])
        network.evaluate(problem.batches[0], update=True)
        mean = 0.9 * before["norm.mean"] + 0.1 * x.mean(axis=0)
        variance = 0.9 * before["norm.variance"] + 0.1 * x.var(axis=0, ddof=int(unbiased))
        assert network.buffers["norm.mean"] == pytest.approx(mean)
        assert network.buffers["norm.variance"] == pytest.approx(variance)


def test_dropout_scales_what_it_keeps():
    network = Network(problems.dropout().layers, seed=3)
    batch = problems.dropout().batches[0]
    found = [network.evaluate(batch).losses for _ in range(4000)]
    assert np.std(found, axis=0).min() > 0.01  # noise in every pass
    hidden = layers.dropout(np.ones((20_000, 1)), 0.3, GENERATOR.random((20_000, 1)))[0]
    assert abs(hidden.mean() - 1.0) < 0.05
    assert set(np.unique(hidden)) == {0.0, 1 / 0.7}


def test_the_networks_own_copy():
    problem = problems.softmax()
    network = Network(problem.layers)
    network.parameters["head.weight"] += 1.0
    assert not np.array_equal(network.parameters["head.weight"], problem.layers[0].weight)
    batch = Batch(problem.batches[0].inputs, problem.batches[0].targets)
    assert network.evaluate(batch).losses.dtype == np.float64
    assert Network(problem.layers, dtype="float32").evaluate(batch).losses.dtype == np.float32
