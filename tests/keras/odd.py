"""The data and the optimizer of tests with unusual models."""

import keras
from tests.keras.scene import data

from esam_keras import ESAM

X, Y = data(20)


def esam(**settings):
    return ESAM(keras.optimizers.SGD(0.1), **{"rho": 0.1, "seed": 3, **settings})
