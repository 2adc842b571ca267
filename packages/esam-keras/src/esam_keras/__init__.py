"""esam-keras: efficient sharpness-aware minimisation for Keras 3, on TensorFlow, JAX and torch.

Change one line of a training script::

    model.compile(optimizer=ESAM(keras.optimizers.SGD(0.1, momentum=0.9)), loss=..., metrics=...)

Importing this package makes `compile` support an `ESAM`; see `esam_keras.hook`.
"""

from esam_core import (
    All,
    Batch,
    Bernoulli,
    Between,
    Every,
    Everything,
    Momentum,
    Only,
    Part,
    Previous,
    Proportional,
    Random,
    RandomSuffix,
    RunningMeans,
    Sometimes,
    StepReport,
    Suffix,
    TopIncrease,
    TopLoss,
)
from esam_core import (
    __version__ as __version__,
)
from esam_keras.hook import install
from esam_keras.optimizer import ESAM
from esam_keras.records import unit_records
from esam_keras.training import train_step

__all__ = [
    "ESAM",
    "All",
    "Batch",
    "Bernoulli",
    "Between",
    "Every",
    "Everything",
    "Momentum",
    "Only",
    "Part",
    "Previous",
    "Proportional",
    "Random",
    "RandomSuffix",
    "RunningMeans",
    "Sometimes",
    "StepReport",
    "Suffix",
    "TopIncrease",
    "TopLoss",
    "train_step",
    "unit_records",
]

install()
