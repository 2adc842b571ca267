"""The data and the optimizer of tests of directions."""

import keras
from tests.keras.scene import data

from esam_keras import ESAM, Everything

X, Y = data(12)


def esam(base=None, **settings):
    settings = {"rho": 0.3, "perturb": Everything(), "gamma": 1.0, **settings}
    return ESAM(base or keras.optimizers.SGD(0.1), **settings)
