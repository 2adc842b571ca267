"""Keras's draw in proportion to scores against the reference's."""

import numpy as np
import pytest
from keras import ops

from esam_core import Proportional
from esam_core.selectors import inclusion_probabilities
from esam_keras.selection import select

INFINITE, UNKNOWN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 2.0, 3.0, 0.5],
        [0.0, 0.0, 8.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [-1.0, 2.0, 3.0, 1.0],
        [-INFINITE, 2.0, 3.0, 1.0],
        [INFINITE, 2.0, 3.0, 1.0],
        [UNKNOWN, 2.0, 3.0, 1.0],
    ],
    ids=str,
)
def test_weights_are_those_of_the_reference(losses):
    """Weights are 1 / (b pi) for the inclusion probability pi, also if losses are not finite."""
    selector, inputs = Proportional(0.5), {"offset": ops.convert_to_tensor([0.3, 0.0])}
    found = select(selector, ops.convert_to_tensor(losses, dtype="float32"), None, inputs, 4)
    pi = inclusion_probabilities(np.array(losses), 2, selector.floor)
    indices = ops.convert_to_numpy(found.indices)
    assert len(set(indices)) == 2
    weights = ops.convert_to_numpy(found.weights)
    np.testing.assert_allclose(weights, 1 / (4 * pi[indices]), rtol=1e-5)


def test_scores_whose_sum_is_too_large_for_float32():
    """They are finite, so a draw must be one of the batch, with finite weights."""
    losses = ops.convert_to_tensor([2e38, 1e38, 2e38, 3e38], dtype="float32")
    found = select(
        Proportional(0.5), losses, None, {"offset": ops.convert_to_tensor([0.3, 0.0])}, 4
    )
    assert len(set(ops.convert_to_numpy(found.indices))) == 2
    assert np.isfinite(ops.convert_to_numpy(found.weights)).all()
