"""esam-core: the specification of ESAM, a NumPy reference, and a kit to check backends with.

ESAM is Efficient Sharpness-aware Minimization (Du et al., ICLR 2022, arXiv 2110.03141). Install
`esam-torch` or `esam-keras` to train with it; this package holds the code that both share.
"""

from esam_core.config import ESAMConfig
from esam_core.directions import Batch, Direction, Momentum, Part, Previous
from esam_core.errors import (
    ESAMError,
    ESAMRuntimeError,
    ESAMTypeError,
    ESAMValueError,
    NonFiniteError,
)
from esam_core.report import RunningMeans, StepReport
from esam_core.samplers import Bernoulli, Everything, Only, RandomSuffix, Sampler, Suffix
from esam_core.schedules import Between, Every, Sometimes
from esam_core.selectors import All, Proportional, Random, Selector, TopIncrease, TopLoss
from esam_core.units import Mask, Unit

__version__ = "0.2.0"

__all__ = [
    "All",
    "Batch",
    "Bernoulli",
    "Between",
    "Direction",
    "ESAMConfig",
    "ESAMError",
    "ESAMRuntimeError",
    "ESAMTypeError",
    "ESAMValueError",
    "Every",
    "Everything",
    "Mask",
    "Momentum",
    "NonFiniteError",
    "Only",
    "Part",
    "Previous",
    "Proportional",
    "Random",
    "RandomSuffix",
    "RunningMeans",
    "Sampler",
    "Selector",
    "Sometimes",
    "StepReport",
    "Suffix",
    "TopIncrease",
    "TopLoss",
    "Unit",
]
